import assert from "node:assert/strict";
import { after, test } from "node:test";

import { createServer } from "nice-grpc";

import { Client, ENDORSEMENT, Key, Node, signStatement } from "../src/index.js";
import { GRPCInferenceServiceDefinition, type ModelInferRequest } from "../src/proto/tiltyard/inference/v2/inference.js";
import {
  ParticipantServiceDefinition,
  type RegisterParticipantRequest,
} from "../src/proto/tiltyard/registry/v1/participant.js";
import { checkTexts } from "../src/texts.js";

const HALF = "\ud83d";
const open: { close?(): void; forceShutdown?(): void }[] = [];

after(() => {
  for (const each of open) (each.close ?? each.forceShutdown)?.call(each);
});

test("half of a surrogate pair is refused before it is sent, by its field's name, and a whole one arrives", async () => {
  const server = createServer();
  const { registerParticipant } = ParticipantServiceDefinition.methods;
  const { modelStreamInfer } = GRPCInferenceServiceDefinition.methods;
  const names: string[] = [];
  server.add({ ...ParticipantServiceDefinition, methods: { registerParticipant } } as const, {
    registerParticipant: async ({ displayName }: RegisterParticipantRequest) => {
      names.push(displayName);
      return {};
    },
  });
  server.add({ ...GRPCInferenceServiceDefinition, methods: { modelStreamInfer } } as const, {
    async *modelStreamInfer(requests: AsyncIterable<ModelInferRequest>) {
      for await (const { modelName } of requests) names.push(modelName);
    },
  });
  const address = `127.0.0.1:${await server.listen("127.0.0.1:0")}`;
  const client = new Client({ key: Key.generate(), origin: "arena", registry: address });
  const node = new Node({ key: Key.generate(), address, nodeId: "0".repeat(40) });
  open.push(client, node, server);
  await client.participants.registerParticipant({ displayName: "a whole \u{1f600}" });
  await assert.rejects(client.participants.registerParticipant({ displayName: `half ${HALF}` }), {
    name: "RangeError",
    message: /^displayName: .*half of a surrogate pair/,
  });
  async function* batches() {
    yield { modelName: HALF };
  }
  const answers = node.inference.modelStreamInfer(batches())[Symbol.asyncIterator]();
  await assert.rejects(answers.next(), /^RangeError: modelName: /);
  assert.deepEqual(names, ["a whole \u{1f600}"]);
});

for (const [message, path] of [
  [{ task: { name: HALF } }, "task.name"],
  [{ spec: { $case: "onnx", value: { outputs: ["y", HALF] } } }, "spec.onnx.outputs[1]"],
  [{ parameters: { [HALF]: 1 } }, `parameters.${HALF}`],
] as const) {
  test(`it is found at ${path.replace(HALF, "half")}`, () => {
    const isNamed = (error: unknown) => error instanceof RangeError && error.message.startsWith(`${path}: `);
    assert.throws(() => checkTexts(message), isNamed);
  });
}

test("nothing is signed with it", () => {
  const statement = { origin: "arena", endorser: "", participant: "", field: HALF, note: "" };
  assert.throws(() => signStatement(Key.generate(), ENDORSEMENT, statement as never), /^RangeError: field: /);
});
