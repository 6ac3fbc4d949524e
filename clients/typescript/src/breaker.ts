/** Fails calls to a dead peer at once, and lets one through now and then to see whether it is back. */

import { ClientError, Status, type CallOptions, type ClientMiddleware, type ClientMiddlewareCall } from "nice-grpc";
import type { DeadlineOptions } from "nice-grpc-client-middleware-deadline";
import { RichClientError } from "nice-grpc-error-details";

/** Calls in a row without an answer that open the breaker. */
export const FAILURES = 5;
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5_000;

/**
 * Counts the calls in a row that a peer left unanswered; from `failures` on, refuses most of the next.
 *
 * While it refuses, one call goes through after each pause, which doubles up to five seconds: its answer, be it an error,
 * lets all through again. Who is refused has waited for nothing, where a peer that hangs costs each caller its whole
 * deadline. `clock` gives milliseconds and never goes back.
 */
export class CircuitBreaker {
  #inARow = 0;
  #pauseMs = FIRST_PAUSE_MS;
  #nextProbe = 0;

  constructor(
    private readonly address: string,
    private readonly failures: number = FAILURES,
    private readonly clock: () => number = () => performance.now(),
  ) {}

  /** Before a call of the method `path`. Throws a ClientError with UNAVAILABLE, without calling, while the peer is dead. */
  admit(path: string): void {
    if (this.#inARow < this.failures) return;
    const waitMs = this.#nextProbe - this.clock();
    if (waitMs > 0) {
      const left = `${this.address} left ${this.#inARow} calls in a row unanswered`;
      throw new ClientError(path, Status.UNAVAILABLE, `${left}; next try in ${(waitMs / 1000).toFixed(1)} s`);
    }
    // This call is the probe. Should it hang, the next goes after another pause.
    this.#nextProbe = this.clock() + this.#pauseMs;
  }

  /** The peer has answered a call, with a result or an error of its own. */
  answered(): void {
    this.#inARow = 0;
    this.#pauseMs = FIRST_PAUSE_MS;
  }

  /** The peer could not be reached, or let a call run into its deadline. */
  unanswered(): void {
    this.#inARow += 1;
    if (this.#inARow < this.failures) return;
    this.#nextProbe = this.clock() + this.#pauseMs;
    this.#pauseMs = Math.min(2 * this.#pauseMs, LONGEST_PAUSE_MS);
  }
}

/**
 * Client middleware: asks `breaker` before each call and tells it what came of it. Attach it after the one that gives
 * deadlines.
 *
 * Of a stream the first message is an answer. Unanswered is one that ends without a message or a reason, and before a
 * call with one answer would have, within `deadlineMs`: a watch that was silent for longer had a peer.
 */
export function breaking(breaker: CircuitBreaker, deadlineMs: number): ClientMiddleware<DeadlineOptions> {
  return async function* withBreaker<Request, Response>(
    call: ClientMiddlewareCall<Request, Response, DeadlineOptions>,
    options: CallOptions & DeadlineOptions,
  ) {
    breaker.admit(call.method.path);
    const startedMs = performance.now();
    let answered = false;
    const heard = () => {
      answered = true;
      breaker.answered();
    };
    try {
      if (call.responseStream) {
        for await (const message of call.next(call.request, options)) {
          if (!answered) heard();
          yield message;
        }
        if (!answered) heard();
        return;
      }
      const response = yield* call.next(call.request, options);
      heard();
      return response;
    } catch (error) {
      // Anything else is of this side: an abort, or what the caller's own requests threw.
      if (error instanceof ClientError && !answered) {
        const stream = call.requestStream || call.responseStream;
        const early = performance.now() - startedMs < deadlineMs;
        const isAnswer = stream ? isAnswerOfStream(error, early) : isAnswerOfCall(error, options);
        if (isAnswer) breaker.answered();
        else if (isAnswer === false) breaker.unanswered();
      }
      throw error;
    }
  };
}

/** Whether the error of a call with one answer comes from the peer. One that says why it is UNAVAILABLE is there. */
function isAnswerOfCall(error: ClientError, { deadline }: DeadlineOptions): boolean {
  if (error.code === Status.UNAVAILABLE) return error instanceof RichClientError;
  // A caller's own deadline may be shorter than any answer takes.
  return error.code !== Status.DEADLINE_EXCEEDED || deadline !== undefined;
}

/** The same of a stream; undefined where its end says nothing of the peer. */
function isAnswerOfStream(error: ClientError, early: boolean): boolean | undefined {
  if (error.code === Status.CANCELLED || error.code === Status.DEADLINE_EXCEEDED) return undefined;
  if (error.code !== Status.UNAVAILABLE || error instanceof RichClientError) return true;
  return early ? false : undefined;
}
