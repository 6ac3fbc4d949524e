import assert from "node:assert/strict";
import { after, test } from "node:test";

import { ServerError, Status, createServer, type CallContext } from "nice-grpc";
import { Any, ErrorInfo, RetryInfo } from "nice-grpc-error-details";

import { ArenaError, Client, Key } from "../src/index.js";
import { TaskServiceDefinition, type DeepPartial, type WatchTaskResponse } from "../src/proto/tiltyard/registry/v1/task.js";

const { closeTask, watchTask } = TaskServiceDefinition.methods;
const open: { close?(): void; forceShutdown?(): void }[] = [];

after(() => {
  for (const each of open) (each.close ?? each.forceShutdown)?.call(each);
});

/** A client of a registry that refuses everything with these bytes as details. */
async function refusing(details: Uint8Array): Promise<Client> {
  const server = createServer();
  const refuse = ({ trailer }: CallContext): never => {
    trailer.set("grpc-status-details-bin", details);
    throw new ServerError(Status.FAILED_PRECONDITION, "no");
  };
  server.add({ ...TaskServiceDefinition, methods: { closeTask, watchTask } } as const, {
    closeTask: async (_request: unknown, context: CallContext) => refuse(context),
    async *watchTask(_request: unknown, context: CallContext): AsyncGenerator<DeepPartial<WatchTaskResponse>> {
      refuse(context);
    },
  });
  const registry = `127.0.0.1:${await server.listen("127.0.0.1:0")}`;
  const client = new Client({ key: Key.generate(), origin: "arena", registry });
  open.push(client, server);
  return client;
}

/** A google.rpc.Status with one detail after the other. */
function status(...details: [type: string, value: Uint8Array][]): Uint8Array {
  const encoded = details.map(([type, value]) => Any.encode(Any.fromPartial({ typeUrl: `x/${type}`, value })).finish());
  return Buffer.concat([Buffer.of(0x08, 9), ...encoded.flatMap((each) => [Buffer.of(0x1a, each.length), each])]);
}

const info = ErrorInfo.encode(ErrorInfo.fromPartial({ reason: "AWAY", metadata: { until: "noon" } })).finish();
const retry = RetryInfo.encode(RetryInfo.fromPartial({ retryDelay: { seconds: 2, nanos: 5e8 } })).finish();
const junk = Buffer.from("ffffffffffff", "hex");

for (const [what, details, reason, retryAfterS] of [
  ["are read", status(["google.rpc.ErrorInfo", info], ["google.rpc.RetryInfo", retry]), "AWAY", 2.5],
  ["of unknown kinds are passed over", status(["other", junk], ["google.rpc.ErrorInfo", info]), "AWAY", undefined],
  ["that are no status are none", junk, "", undefined],
  ["that are text are none", Buffer.from("junk!"), "", undefined],
  ["that are cut short are none", status(["google.rpc.ErrorInfo", info]).subarray(0, -3), "", undefined],
  ["that hold no message are none", status(["google.rpc.ErrorInfo", junk]), "", undefined],
  ["are read up to what holds no message", status(["google.rpc.ErrorInfo", info], ["google.rpc.RetryInfo", junk]), "AWAY", undefined],
] as const) {
  test(`details of an error ${what}, of calls and of streams`, { timeout: 10_000 }, async () => {
    const client = await refusing(details);
    const ends = await Promise.allSettled([
      client.tasks.closeTask({ name: "tasks/t" }),
      client.tasks.watchTask({ name: "tasks/t" })[Symbol.asyncIterator]().next(),
    ]);
    for (const end of ends) {
      const error = (end as PromiseRejectedResult).reason as unknown;
      assert.ok(error instanceof ArenaError, String(error));
      assert.deepEqual([error.code, error.message, error.reason], [Status.FAILED_PRECONDITION, "no", reason]);
      assert.equal(error.retryAfterS, retryAfterS);
    }
  });
}
