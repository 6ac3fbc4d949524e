import assert from "node:assert/strict";
import { once } from "node:events";
import { connect, createServer as createPort, type AddressInfo, type Server as Port, type Socket } from "node:net";
import { after, test } from "node:test";

import { ClientError, Status, createServer, type CallContext, type Server } from "nice-grpc";
import { ErrorInfo, RichServerError, errorDetailsServerMiddleware } from "nice-grpc-error-details";

import { CircuitBreaker, FAILURES } from "../src/breaker.js";
import { ArenaError, Client, Key } from "../src/index.js";
import { TaskServiceDefinition, type DeepPartial, type WatchTaskResponse } from "../src/proto/tiltyard/registry/v1/task.js";

const { closeTask, watchTask } = TaskServiceDefinition.methods;
const SERVED = { ...TaskServiceDefinition, methods: { closeTask, watchTask } } as const;

const open: { close?(): void; forceShutdown?(): void }[] = [];

after(() => {
  for (const each of open) (each.close ?? each.forceShutdown)?.call(each);
});

/** What a peer does; `messages` come of a watch, which then lasts until it is ended. */
interface Behaviour {
  close?: () => void;
  messages?: number;
  watching?: number;
}

async function serve(behaviour: Behaviour, port = 0): Promise<{ server: Server; port: number }> {
  const server = createServer().use(errorDetailsServerMiddleware);
  server.add(SERVED, {
    closeTask: async () => {
      behaviour.close?.();
      return {};
    },
    async *watchTask(_request: unknown, { signal }: CallContext): AsyncGenerator<DeepPartial<WatchTaskResponse>> {
      behaviour.watching = (behaviour.watching ?? 0) + 1;
      behaviour.close?.();
      for (let sent = 0; sent < (behaviour.messages ?? 0); sent += 1) yield { cursor: String(sent) };
      await new Promise((_resolve, reject) => signal.addEventListener("abort", () => reject(new DOMException("gone", "AbortError"))));
    },
  });
  const bound = await server.listen(`127.0.0.1:${port}`);
  open.push(server);
  return { server, port: bound };
}

function connected(port: number, deadlineMs?: number): Client {
  const client = new Client({ key: Key.generate(), origin: "arena", registry: `127.0.0.1:${port}`, deadlineMs });
  open.push(client);
  return client;
}

/** A port where nobody listens any more. */
async function deadPort(): Promise<number> {
  const { server, port } = await serve({});
  server.forceShutdown();
  return port;
}

async function close(client: Client): Promise<ArenaError | undefined> {
  return client.tasks.closeTask({ name: "tasks/t" }).then(
    () => undefined,
    (error: unknown) => {
      assert.ok(error instanceof ArenaError, String(error));
      return error;
    },
  );
}

function isRefusal(error: ArenaError | undefined): boolean {
  return error !== undefined && error.code === Status.UNAVAILABLE && error.message.includes("calls in a row unanswered");
}

/** A watch up to its first message, or to its end. */
async function firstOf(client: Client): Promise<AsyncIterator<WatchTaskResponse>> {
  const watching = client.tasks.watchTask({ name: "tasks/t" })[Symbol.asyncIterator]();
  await watching.next();
  return watching;
}

async function until(condition: () => boolean | Promise<boolean>): Promise<void> {
  while (!(await condition())) await new Promise((resolve) => setTimeout(resolve, 20));
}

/** A port that leads to another one until it is cut. */
class Line {
  private readonly sockets = new Set<Socket>();

  private constructor(
    private readonly listener: Port,
    readonly port: number,
  ) {}

  static async to(port: number): Promise<Line> {
    const listener = createPort();
    listener.listen(0, "127.0.0.1");
    await once(listener, "listening");
    const line = new Line(listener, (listener.address() as AddressInfo).port);
    listener.on("connection", (socket) => {
      const there = connect(port, "127.0.0.1");
      for (const each of [socket, there]) {
        line.sockets.add(each);
        each.on("error", () => each.destroy());
      }
      socket.pipe(there).pipe(socket);
    });
    return line;
  }

  /** As when the process at the other end dies. */
  cut(): void {
    this.listener.close();
    for (const socket of this.sockets) socket.destroy();
  }
}

test("a breaker opens, probes and closes", () => {
  let now = 0;
  const breaker = new CircuitBreaker("peer:1", 3, () => now);
  const admitted = () => {
    try {
      breaker.admit("/a/B");
      return true;
    } catch (error) {
      assert.ok(error instanceof ClientError && error.code === Status.UNAVAILABLE && error.path === "/a/B");
      return false;
    }
  };
  breaker.unanswered();
  breaker.unanswered();
  breaker.answered(); // the row starts anew
  for (let failed = 0; failed < 3; failed += 1) {
    assert.ok(admitted());
    breaker.unanswered();
  }
  assert.ok(!admitted());
  const pauses: number[] = [];
  for (let probed = 0; probed < 6; probed += 1) {
    const began = now;
    while (!admitted()) now += 10;
    pauses.push(now - began);
    // One probe at a time, however many want to call; and one that hangs does not keep the next away.
    assert.ok(!admitted());
    breaker.unanswered();
  }
  assert.deepEqual(pauses, [500, 1000, 2000, 4000, 5000, 5000]);
  now += 5000;
  assert.ok(admitted());
  assert.ok(!admitted());
  now += 5000;
  assert.ok(admitted());
  breaker.answered();
  for (let made = 0; made < 10; made += 1) assert.ok(admitted());
});

test("calls to a dead peer fail at once and work again when it is back", { timeout: 60_000 }, async () => {
  const port = await deadPort();
  const client = connected(port);
  const failed = await Promise.all(Array.from({ length: FAILURES }, () => close(client)));
  for (const error of failed) assert.ok(error?.code === Status.UNAVAILABLE && !isRefusal(error), String(error));
  const began = performance.now();
  for (let made = 0; made < 20; made += 1) assert.ok(isRefusal(await close(client)));
  // Each would have made four attempts with pauses of 0.2 s and more in between.
  assert.ok(performance.now() - began < 400);
  // Nor does another service of the same peer have to find out by itself.
  await assert.rejects(client.participants.listParticipants({}), isRefusal);
  await serve({}, port);
  await until(async () => (await close(client)) === undefined);
  const ended = await Promise.all(Array.from({ length: 20 }, () => close(client)));
  assert.ok(ended.every((error) => error === undefined));
});

test("calls to a peer that hangs fail at once", { timeout: 30_000 }, async () => {
  const held: Socket[] = [];
  const listener = createPort((socket) => held.push(socket.on("error", () => undefined)));
  listener.listen(0, "127.0.0.1");
  await once(listener, "listening");
  const client = connected((listener.address() as AddressInfo).port, 200);
  for (let made = 0; made < FAILURES; made += 1) {
    const error = await close(client);
    assert.ok(error?.isTransient && !isRefusal(error), String(error));
  }
  assert.ok(isRefusal(await close(client)));
  listener.close();
  for (const socket of held) socket.destroy();
});

test("a deadline that the caller chose says nothing of the peer", { timeout: 30_000 }, async () => {
  const held: Socket[] = [];
  const listener = createPort((socket) => held.push(socket.on("error", () => undefined)));
  listener.listen(0, "127.0.0.1");
  await once(listener, "listening");
  const client = connected((listener.address() as AddressInfo).port);
  for (let made = 0; made < 2 * FAILURES; made += 1) {
    await assert.rejects(
      client.tasks.closeTask({ name: "tasks/t" }, { deadline: 20 }),
      (error) => error instanceof ArenaError && error.code === Status.DEADLINE_EXCEEDED,
    );
  }
  listener.close();
  for (const socket of held) socket.destroy();
});

test("a peer that says why it can not is not dead", { timeout: 60_000 }, async () => {
  const behaviour: Behaviour = {
    close: () => {
      throw new RichServerError(Status.UNAVAILABLE, "stopping", [ErrorInfo.fromPartial({ reason: "SERVER_DRAINING" })]);
    },
  };
  const client = connected((await serve(behaviour)).port);
  const all = Array.from({ length: 2 * FAILURES });
  for (const error of await Promise.all(all.map(() => close(client)))) assert.equal(error?.reason, "SERVER_DRAINING");
  for (const end of await Promise.allSettled(all.map(() => firstOf(client)))) {
    assert.ok(end.status === "rejected" && (end.reason as ArenaError).reason === "SERVER_DRAINING");
  }
  behaviour.close = undefined;
  assert.equal(await close(client), undefined);
});

test("watches of a dead peer are calls without an answer", { timeout: 60_000 }, async () => {
  const client = connected(await deadPort());
  const ends = await Promise.allSettled(Array.from({ length: FAILURES }, () => firstOf(client)));
  for (const end of ends) assert.ok(end.status === "rejected" && !isRefusal(end.reason as ArenaError));
  assert.ok(isRefusal(await close(client)));
});

test("watches that brought something and end with their server leave the breaker closed", { timeout: 60_000 }, async () => {
  const line = await Line.to((await serve({ messages: 1 })).port);
  const client = connected(line.port);
  const watches = await Promise.all(Array.from({ length: 2 * FAILURES }, () => firstOf(client)));
  const rest = watches.map((watching) => watching.next());
  line.cut();
  for (const end of await Promise.allSettled(rest)) {
    assert.ok(end.status === "rejected" && (end.reason as ArenaError).code === Status.UNAVAILABLE, JSON.stringify(end));
  }
  assert.ok(!isRefusal(await close(client)));
});

for (const { deadlineMs, opens } of [
  { deadlineMs: 200, opens: false },
  { deadlineMs: 60_000, opens: true },
]) {
  const had = opens ? "that are cut early had none" : "had a peer when a call would have been over before them";
  test(`silent watches ${had}`, { timeout: 60_000 }, async () => {
    const behaviour: Behaviour = { messages: 0 };
    const line = await Line.to((await serve(behaviour)).port);
    const client = connected(line.port, deadlineMs);
    const watches = Array.from({ length: 2 * FAILURES }, () => firstOf(client));
    const ended = Promise.allSettled(watches);
    await until(() => behaviour.watching === watches.length);
    await new Promise((resolve) => setTimeout(resolve, 250)); // older than the shorter of the two deadlines
    line.cut();
    for (const end of await ended) {
      assert.ok(end.status === "rejected" && (end.reason as ArenaError).code === Status.UNAVAILABLE, JSON.stringify(end));
    }
    assert.equal(isRefusal(await close(client)), opens);
  });
}

test("the first message of a watch closes the breaker while it goes on", { timeout: 60_000 }, async () => {
  const port = await deadPort();
  const client = connected(port);
  await Promise.all(Array.from({ length: FAILURES }, () => close(client)));
  await serve({ messages: 1 }, port);
  let watching: AsyncIterator<WatchTaskResponse> | undefined;
  await until(async () => {
    watching = await firstOf(client).catch(() => undefined);
    return watching !== undefined;
  });
  const ended = await Promise.all(Array.from({ length: 20 }, () => close(client)));
  assert.ok(ended.every((error) => error === undefined));
  const last = watching?.next().catch(() => undefined);
  client.close();
  await last;
});

test("a watch that its reader leaves is ended at the peer", { timeout: 60_000 }, async () => {
  const ended = new Promise<void>((resolve) => {
    const server = createServer();
    server.add(SERVED, {
      closeTask: async () => ({}),
      async *watchTask(_request: unknown, { signal }: CallContext): AsyncGenerator<DeepPartial<WatchTaskResponse>> {
        signal.addEventListener("abort", () => resolve());
        yield { cursor: "0" };
        await new Promise((_resolve, reject) => signal.addEventListener("abort", () => reject(new DOMException("gone", "AbortError"))));
      },
    });
    open.push(server);
    void server.listen("127.0.0.1:0").then(async (port) => {
      for await (const _message of connected(port).tasks.watchTask({ name: "tasks/t" })) break;
    });
  });
  await ended;
});
