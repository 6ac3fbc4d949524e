/** Streams that what lies between may hold open for ever: they are ended when nothing comes for long. */

import { Status } from "nice-grpc";

import { ArenaError } from "./errors.js";

/** Where nothing happens a server is silent, too; over a slow line a chunk takes its time. */
export const LONGEST_SILENCE_MS = 120_000;

/** What a watch tells the call that it makes. */
export interface WatchOptions {
  signal: AbortSignal;
  /** Called when the server has taken the stream up, which it says at once. */
  onHeader: () => void;
}

/** Watches over one stream, which has to be called with its `options`, for at most `firstMs` milliseconds until it is taken up. */
export class Silence {
  isTakenUp = false;
  readonly options: WatchOptions;
  readonly #ending = new AbortController();
  #timer: NodeJS.Timeout | undefined;
  #error: ArenaError | undefined;

  constructor(
    firstMs: number,
    private readonly signal: AbortSignal | undefined,
  ) {
    const onHeader = () => {
      this.isTakenUp = true;
      this.#begin(LONGEST_SILENCE_MS);
    };
    this.options = { signal: AbortSignal.any([this.#ending.signal, ...(signal ? [signal] : [])]), onHeader };
    this.#begin(firstMs);
  }

  /** The messages of the stream. Throws what it throws, and ArenaError with DEADLINE_EXCEEDED when none comes for long. */
  async *heard<Message>(stream: AsyncIterable<Message>): AsyncGenerator<Message, void, undefined> {
    try {
      for await (const message of stream) {
        // What is done with it takes as long as it likes.
        clearTimeout(this.#timer);
        yield message;
        this.#begin(LONGEST_SILENCE_MS);
      }
    } catch (error) {
      throw this.signal?.aborted ? error : (this.#error ?? error);
    } finally {
      clearTimeout(this.#timer);
    }
  }

  #begin(longestMs: number): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      const said = `nothing has come for ${longestMs / 1000} s`;
      this.#error = new ArenaError(Status.DEADLINE_EXCEEDED, said, "", {}, [], undefined);
      this.#ending.abort();
    }, longestMs);
  }
}
