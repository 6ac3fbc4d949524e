import assert from "node:assert/strict";
import { once } from "node:events";
import { test, type TestContext } from "node:test";

import { Status } from "nice-grpc";

import { ArenaError, persist, watch, type WatchOptions } from "../src/index.js";

function refusal(code: Status, reason: string, retryAfterS?: number): ArenaError {
  return new ArenaError(code, "no", reason, {}, [], retryAfterS);
}

/** A watch whose stream brings one message more at each try and then fails with the next of `errors`, or ends. */
function breaking(errors: ArenaError[]): { seen: () => Promise<string[]>; cursors: string[] } {
  const cursors: string[] = [];
  async function* method({ cursor = "" }: { cursor?: string }) {
    cursors.push(cursor);
    yield { cursor: String(cursors.length) };
    const error = errors[cursors.length - 1];
    if (error) throw error;
  }
  const seen = async () => {
    const messages: string[] = [];
    for await (const { cursor } of watch(method, {})) messages.push(cursor);
    return messages;
  };
  return { seen, cursors };
}

test("a watch goes on after a restart, and after the wait that a server names to who calls too often", async () => {
  const tooMany = refusal(Status.RESOURCE_EXHAUSTED, "CALL_RATE", 0.02);
  assert.equal(tooMany.leastPauseMs, 20);
  const { seen, cursors } = breaking([refusal(Status.UNAVAILABLE, ""), tooMany]);
  assert.deepEqual(await seen(), ["1", "2", "3"]);
  assert.deepEqual(cursors, ["", "1", "2"]);
});

test("a call waits for as long as it is told by a server whose disk is full, or that is away", async () => {
  for (const [code, reason] of [
    [Status.RESOURCE_EXHAUSTED, "DISK_FULL"],
    [Status.UNAVAILABLE, "AWAY"],
  ] as const) {
    const at: number[] = [];
    const answer = await persist(async () => {
      at.push(performance.now());
      if (at.length < 3) throw refusal(code, reason, 0.3);
      return "done";
    });
    assert.equal(answer, "done");
    for (const nth of [1, 2]) assert.ok(at[nth]! - at[nth - 1]! >= 299, String(at));
  }
});

test("a watch ends with what waiting does not help, or takes longer than its patience", async () => {
  for (const error of [
    refusal(Status.PERMISSION_DENIED, "NOT_A_MEMBER"),
    refusal(Status.RESOURCE_EXHAUSTED, "QUOTA_USED_UP", 1),
    refusal(Status.RESOURCE_EXHAUSTED, "CALL_RATE", 3_600),
  ]) {
    await assert.rejects(breaking([error]).seen(), error);
  }
});

test("a watch that was silent for longer than its patience goes on when its server restarts", async (t) => {
  let now = 0;
  t.mock.method(performance, "now", () => now);
  const cursors: string[] = [];
  async function* method({ cursor = "" }: { cursor?: string }, { onHeader }: WatchOptions) {
    cursors.push(cursor);
    onHeader();
    if (cursors.length === 1) yield { cursor: "1" };
    if (cursors.length === 3) return;
    now += 100_000; // as a task in which nothing happens
    throw refusal(Status.UNAVAILABLE, "");
  }
  for await (const _message of watch(method, {}));
  assert.deepEqual(cursors, ["", "1", "1"]);
});

test("a watch ends with its last error when no stream can be had for its patience", async () => {
  const cursors: string[] = [];
  async function* method({ cursor = "" }: { cursor?: string }): AsyncGenerator<{ cursor: string }> {
    cursors.push(cursor);
    throw refusal(Status.UNAVAILABLE, "");
  }
  const watched = watch(method, {}, { patienceMs: 350 });
  await assert.rejects(watched.next(), ArenaError);
  assert.equal(cursors.length, 3); // after 0, 100 and 300 ms
});

test("a watch that is aborted ends with its signal's error, also in a pause", { timeout: 5_000 }, async () => {
  const ending = new AbortController();
  const signals: AbortSignal[] = [];
  async function* method(_request: object, { signal }: WatchOptions): AsyncGenerator<{ cursor: string }> {
    signals.push(signal);
    setTimeout(() => ending.abort(), 20);
    throw refusal(Status.RESOURCE_EXHAUSTED, "CALL_RATE", 30);
  }
  await assert.rejects(watch(method, {}, { signal: ending.signal }).next(), { name: "AbortError" });
  assert.deepEqual(signals.map(({ aborted }) => aborted), [true]);
});

/** A watch whose first streams bring nothing and stay open until they are ended; `answers` is whether a server is there. */
function silent(streams: number, answers: boolean) {
  const cursors: string[] = [];
  async function* method({ cursor = "" }: { cursor?: string }, { signal, onHeader }: WatchOptions) {
    cursors.push(cursor);
    if (cursors.length === 1) yield { cursor: "1" };
    if (answers) onHeader();
    if (cursors.length > streams) return;
    await once(signal, "abort");
    throw new DOMException("ended", "AbortError");
  }
  return { method, cursors };
}

/** What `watched` brings while time passes at a thousand times its pace (but for the pauses between two streams). */
async function passing(t: TestContext, watched: AsyncIterable<{ cursor: string }>): Promise<string[]> {
  let now = 0;
  t.mock.timers.enable({ apis: ["setTimeout"] });
  t.mock.method(performance, "now", () => now);
  const ticking = setInterval(() => {
    now += 1_000;
    t.mock.timers.tick(1_000);
  }, 1);
  try {
    const seen: string[] = [];
    for await (const { cursor } of watched) seen.push(cursor);
    return seen;
  } finally {
    clearInterval(ticking);
  }
}

test("a watch that was silent for two minutes is asked for again, from its cursor", { timeout: 60_000 }, async (t) => {
  const { method, cursors } = silent(4, true);
  assert.deepEqual(await passing(t, watch(method, {}, { patienceMs: 10_000 })), ["1"]);
  assert.deepEqual(cursors, ["", "1", "1", "1", "1"]);
});

test("a watch that no server takes up is given up", { timeout: 60_000 }, async (t) => {
  const { method, cursors } = silent(100, false);
  const refused = { name: "ArenaError", code: Status.DEADLINE_EXCEEDED, message: "nothing has come for 20 s" };
  await assert.rejects(passing(t, watch(method, {}, { patienceMs: 200_000 })), refused);
  assert.ok(cursors.length > 1, String(cursors.length));
});
