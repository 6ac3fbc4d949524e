import assert from "node:assert/strict";
import { getEventListeners } from "node:events";
import { after, test } from "node:test";
import { fileURLToPath } from "node:url";

import { Status, createServer } from "nice-grpc";
import { ErrorInfo, RichServerError, errorDetailsServerMiddleware } from "nice-grpc-error-details";

import { STREAM_DEADLINE_MS, deadlines } from "../src/calling.js";
import { ArenaError, Client, Key, Node, fileDigest } from "../src/index.js";
import { GRPCInferenceServiceDefinition, type ModelInferRequest } from "../src/proto/tiltyard/inference/v2/inference.js";
import { TaskServiceDefinition, type CloseTaskRequest } from "../src/proto/tiltyard/registry/v1/task.js";
import { pause } from "../src/watching.js";

const { closeTask, listTasks } = TaskServiceDefinition.methods;
const SERVED = { ...TaskServiceDefinition, methods: { closeTask, listTasks } } as const;

const open: { close?(): void; forceShutdown?(): void }[] = [];

after(() => {
  for (const each of open) (each.close ?? each.forceShutdown)?.call(each);
});

/** A client of a registry that closes a task when `close` does not throw, and never answers what its tasks are. */
async function connected(close: (request: CloseTaskRequest) => void, deadlineMs?: number): Promise<Client> {
  const server = createServer().use(errorDetailsServerMiddleware);
  server.add(SERVED, {
    closeTask: async (request: CloseTaskRequest) => {
      close(request);
      return {};
    },
    listTasks: (_request, { signal }) =>
      new Promise((_resolve, reject) => signal.addEventListener("abort", () => reject(new DOMException("gone", "AbortError")))),
  });
  const port = await server.listen("127.0.0.1:0");
  const client = new Client({ key: Key.generate(), origin: "arena", registry: `127.0.0.1:${port}`, deadlineMs });
  open.push(client, server);
  return client;
}

function unavailable(): never {
  throw new RichServerError(Status.UNAVAILABLE, "not now", [ErrorInfo.fromPartial({ reason: "AWAY" })]);
}

test("a call that is never answered ends by the client's deadline", { timeout: 10_000 }, async () => {
  const client = await connected(() => undefined, 200);
  const ended = await client.tasks.listTasks({}).catch((error: unknown) => error);
  assert.ok(ended instanceof ArenaError && ended.code === Status.DEADLINE_EXCEEDED, String(ended));
});

test("a call of any shape has a deadline, its own before ours", async () => {
  const seen: unknown[] = [];
  for (const [requestStream, responseStream, deadline] of [
    [false, false, undefined],
    [false, true, undefined],
    [true, false, undefined],
    [false, true, 5],
  ]) {
    const next = async function* (_request: unknown, options: { deadline?: unknown }) {
      seen.push(options.deadline);
    };
    const call = { method: {}, requestStream, responseStream, request: {}, next };
    await deadlines(7)(call as never, { deadline } as never).next();
  }
  assert.deepEqual(seen, [7, STREAM_DEADLINE_MS, STREAM_DEADLINE_MS, 5]);
});

test("a proxy from the environment is not asked for this machine", async () => {
  process.env["http_proxy"] = "http://127.0.0.1:1";
  try {
    const client = await connected(() => undefined);
    await client.tasks.closeTask({ name: "tasks/t" });
  } finally {
    delete process.env["http_proxy"];
  }
});

test("a change goes out with a request id that stays the same through repeats", { timeout: 20_000 }, async () => {
  const ids: string[] = [];
  const client = await connected(({ requestId }) => {
    ids.push(requestId);
    if (ids.length < 3) unavailable();
  });
  await client.tasks.closeTask({ name: "tasks/t" });
  await client.tasks.closeTask({ name: "tasks/t", requestId: "mine" });
  assert.equal(ids.length, 4);
  assert.match(ids[0] ?? "", /^[0-9a-f]{32}$/);
  assert.deepEqual(ids.slice(1), [ids[0], ids[0], "mine"]);
});

test("one signal may be shared by many calls, pauses and digests", { timeout: 20_000 }, async () => {
  const client = await connected(() => undefined);
  const { signal } = new AbortController();
  const warnings: Error[] = [];
  const heard = (warning: Error) => void warnings.push(warning);
  process.on("warning", heard);
  const uses: (() => Promise<unknown>)[] = [
    () => client.tasks.closeTask({ name: "tasks/t" }, { signal }),
    () => pause(50, signal),
    () => fileDigest(fileURLToPath(import.meta.url), signal),
  ];
  for (const used of uses) {
    await Promise.all(Array.from({ length: 30 }, used));
    await pause(10); // a warning comes a tick later
    assert.deepEqual(getEventListeners(signal, "abort"), []);
  }
  process.off("warning", heard);
  assert.deepEqual(warnings, []);
});

test("a node is sent batches and answers as large as the inference protocol allows", { timeout: 20_000 }, async () => {
  const limits = { "grpc.max_receive_message_length": 2 ** 24, "grpc.max_send_message_length": 2 ** 24 };
  const server = createServer(limits);
  const { modelInfer } = GRPCInferenceServiceDefinition.methods;
  server.add({ ...GRPCInferenceServiceDefinition, methods: { modelInfer } } as const, {
    modelInfer: async ({ rawInputContents }: ModelInferRequest) => ({ rawOutputContents: rawInputContents }),
  });
  const address = `127.0.0.1:${await server.listen("127.0.0.1:0")}`;
  const node = new Node({ key: Key.generate(), address, nodeId: "0".repeat(40) });
  open.push(node, server);
  const rows = new Uint8Array(15 * 1024 * 1024).fill(7);
  const { rawOutputContents } = await node.inference.modelInfer({ rawInputContents: [rows] });
  assert.ok(Buffer.from(rows).equals(rawOutputContents[0]!));
});

test("repeats have a budget", { timeout: 60_000 }, async () => {
  let asked = 0;
  const client = await connected(() => {
    asked += 1;
    unavailable();
  });
  const calls = 100;
  for (let made = 0; made < calls; made += 10) {
    const together = Array.from({ length: 10 }, () => client.tasks.closeTask({ name: "tasks/t" }));
    for (const end of await Promise.allSettled(together)) {
      assert.ok(end.status === "rejected" && end.reason instanceof ArenaError && end.reason.isTransient);
    }
  }
  // Without a budget there would be 400 attempts; half of the hundred tokens pay for repeats.
  assert.ok(asked > calls && asked <= calls + 60, String(asked));
});

test("an address that is none is refused at once, and no scheme is passed over", () => {
  const key = Key.generate();
  for (const address of ["127.0.0.1:7401", "[::1]:1", "registry.example:65535", "unix:/run/registry", "dns:///registry:1"]) {
    new Client({ key, origin: "arena", registry: address, selector: address }).close();
    new Node({ key, address, nodeId: "x" }).close();
  }
  for (const address of ["", "localhost", "https://registry.example:443", "registry:0", "registry:65536", "unix:", "::1:1"]) {
    assert.throws(() => new Client({ key, origin: "arena", registry: address }), RangeError, address);
    assert.throws(() => new Client({ key, origin: "arena", registry: "r:1", selector: address }), RangeError, address);
    assert.throws(() => new Node({ key, address, nodeId: "x" }), RangeError, address);
  }
});
