/** Lists to their end and watches without end: pages one after the other, streams that resume where they broke. */

import { setTimeout as wait } from "node:timers/promises";

import { DEADLINE_MS, shared } from "./calling.js";
import { ArenaError } from "./errors.js";
import { Silence, type WatchOptions } from "./silence.js";

const FIRST_WAIT_MS = 100;
const LONGEST_WAIT_MS = 2_000;
/** Milliseconds to go on without an answer. */
export const PATIENCE_MS = 60_000;

/** How long to go on, and what ends it before: an aborted signal throws its AbortError. */
export interface Patient {
  /** Milliseconds, 60,000 where left out. */
  patienceMs?: number;
  signal?: AbortSignal;
}

/**
 * The answer of `call`, made again and again with growing pauses while it fails for a transient reason.
 *
 * A mutating call must carry one request id through all of them. Throws the last ArenaError.
 */
export async function persist<Answer>(call: () => Promise<Answer>, patient: Patient = {}): Promise<Answer> {
  const giveUpAt = performance.now() + (patient.patienceMs ?? PATIENCE_MS);
  for (let waitMs = FIRST_WAIT_MS; ; waitMs = Math.min(2 * waitMs, LONGEST_WAIT_MS)) {
    let pauseMs: number;
    try {
      return await call();
    } catch (error) {
      pauseMs = pauseBefore(error, waitMs, giveUpAt);
    }
    await pause(pauseMs, patient.signal);
  }
}

/** Milliseconds until the next attempt: `waitMs`, or more where the server said so. Throws the error when it is over. */
function pauseBefore(error: unknown, waitMs: number, giveUpAt: number): number {
  const leastMs = error instanceof ArenaError ? error.leastPauseMs : undefined;
  if (leastMs === undefined) throw error;
  const pauseMs = Math.max(waitMs, leastMs);
  if (performance.now() + pauseMs > giveUpAt) throw error;
  return pauseMs;
}

/** All pages of a list method, in order. */
export async function* pages<Request extends { pageToken?: string }, Page extends { nextPageToken: string }>(
  method: (request: Request) => Promise<Page>,
  request: Request,
): AsyncGenerator<Page, void, undefined> {
  let pageToken = request.pageToken ?? "";
  do {
    const page = await method({ ...request, pageToken });
    yield page;
    pageToken = page.nextPageToken;
  } while (pageToken);
}

/**
 * The messages of a watch: a stream that breaks is started again after the last cursor, without gap or repeat.
 *
 * Throws the ArenaError that is not transient, or the last one when no stream can be had for the patience; one that stands
 * may be silent for as long as it likes. After each two minutes of silence it is asked for again, since what stands may be
 * broken.
 */
export async function* watch<Request extends { cursor?: string }, Message extends { cursor: string }>(
  method: (request: Request, options: WatchOptions) => AsyncIterable<Message>,
  request: Request,
  { patienceMs = PATIENCE_MS, signal }: Patient = {},
): AsyncGenerator<Message, void, undefined> {
  let cursor = request.cursor ?? "";
  let waitMs = FIRST_WAIT_MS;
  let giveUpAt: number | undefined;
  for (;;) {
    const beganAt = performance.now();
    const silence = new Silence(DEADLINE_MS, signal);
    let pauseMs: number;
    try {
      for await (const message of silence.heard(method({ ...request, cursor }, silence.options))) {
        cursor = message.cursor;
        [waitMs, giveUpAt] = [FIRST_WAIT_MS, undefined];
        yield message;
      }
      return;
    } catch (error) {
      const brokeAt = performance.now();
      // A stream that stood for longer than the channel's own retries take had a server, though it brought nothing.
      if (giveUpAt === undefined || (silence.isTakenUp && brokeAt - beganAt > DEADLINE_MS)) {
        [waitMs, giveUpAt] = [FIRST_WAIT_MS, brokeAt + patienceMs];
      }
      pauseMs = pauseBefore(error, waitMs, giveUpAt);
    }
    await pause(pauseMs, signal);
    waitMs = Math.min(2 * waitMs, LONGEST_WAIT_MS);
  }
}

/** Resolves after `ms` milliseconds. Throws an AbortError when the signal is aborted before. */
export async function pause(ms: number, signal?: AbortSignal): Promise<void> {
  await wait(ms, undefined, { signal: shared(signal) });
}
