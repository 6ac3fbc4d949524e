/** Lists to their end and watches without end: pages one after the other, streams that resume where they broke. */

import { ArenaError } from "./errors.js";

const FIRST_WAIT_MS = 100;
const LONGEST_WAIT_MS = 2_000;

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
  } while (pageToken !== "");
}

/**
 * The messages of a watch: a stream that breaks is started again after the last cursor, without gap or repeat.
 *
 * Throws the ArenaError that is not transient, or the last one when broken streams bring nothing for `patienceMs`.
 */
export async function* watch<Request extends { cursor?: string }, Message extends { cursor: string }>(
  method: (request: Request) => AsyncIterable<Message>,
  request: Request,
  patienceMs = 60_000,
): AsyncGenerator<Message, void, undefined> {
  let cursor = request.cursor ?? "";
  let waitMs = FIRST_WAIT_MS;
  let giveUpAt = Date.now() + patienceMs;
  for (;;) {
    let pauseMs: number;
    try {
      for await (const message of method({ ...request, cursor })) {
        cursor = message.cursor;
        waitMs = FIRST_WAIT_MS;
        yield message;
        giveUpAt = Date.now() + patienceMs;
      }
      return;
    } catch (error) {
      const leastMs = error instanceof ArenaError ? error.leastPauseMs : undefined;
      if (leastMs === undefined) throw error;
      pauseMs = Math.max(waitMs, leastMs);
      if (Date.now() + pauseMs > giveUpAt) throw error;
    }
    await pause(pauseMs);
    waitMs = Math.min(2 * waitMs, LONGEST_WAIT_MS);
  }
}

/** Resolves after `ms` milliseconds. */
export function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
