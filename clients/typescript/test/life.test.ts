import assert from "node:assert/strict";
import { readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { toHex } from "../src/bytes.js";
import * as tiltyard from "../src/index.js";
import { TaskConfig, TaskState } from "../src/proto/tiltyard/type/v1/task.js";
import { SubmissionState } from "../src/proto/tiltyard/type/v1/evaluation.js";
import { LogEntry } from "../src/proto/tiltyard/type/v1/log.js";
import { Role } from "../src/proto/tiltyard/type/v1/participation.js";
import { Arena } from "./arena.js";
import { tiltyard as command } from "./python.js";
import { writeSafetensors } from "./safetensors.js";

const ORIGIN = "tiltyard.local";
const ROWS = 200;
const FEATURES = 4;
const CLASSES = 3;
const STAKE_MICROS = 1_000_000_000n;

let arena: Arena;
const open: tiltyard.Client[] = [];

before(async () => {
  arena = await Arena.start();
});

after(async () => {
  for (const client of open) client.close();
  await (arena as Arena | undefined)?.stop();
});

function connect(key: tiltyard.Key): tiltyard.Client {
  const addresses = { registry: arena.address("registry"), selector: arena.address("selector") };
  const client = new tiltyard.Client({ key, origin: ORIGIN, ...addresses });
  open.push(client);
  return client;
}

/** Registers a key's holder and has the operator deposit a stake for it. */
async function enter(operator: tiltyard.Client, key: tiltyard.Key, displayName: string): Promise<tiltyard.Client> {
  const client = connect(key);
  await client.participants.registerParticipant({ displayName, requestId: tiltyard.newRequestId() });
  await operator.stakes.deposit({
    participant: client.participant,
    amountMicros: STAKE_MICROS,
    reference: `payment of ${displayName}`,
    fundingAccount: `account of ${displayName}`,
    requestId: tiltyard.newRequestId(),
  });
  return client;
}

/** Rows whose label is the largest of their first three features, wrong for every seventh row. */
function evaluationSet(): { x: Float32Array; y: BigInt64Array; correct: number } {
  const x = new Float32Array(ROWS * FEATURES);
  const y = new BigInt64Array(ROWS);
  for (let row = 0; row < ROWS; row += 1) {
    const largest = row % CLASSES;
    for (let column = 0; column < FEATURES; column += 1) x[row * FEATURES + column] = column === largest ? 2 : 0.5;
    y[row] = BigInt(row % 7 === 0 ? (largest + 1) % CLASSES : largest);
  }
  return { x, y, correct: ROWS - Math.ceil(ROWS / 7) };
}

test("a task lives from its creation to a score that an outsider checks", { timeout: 120_000 }, async () => {
  const operator = connect(await tiltyard.Key.load(join(arena.folder, "operator.pem")));
  const creator = await enter(operator, tiltyard.Key.generate(), "A creator");
  const node = await enter(operator, tiltyard.Key.generate(), "A node");
  const validator = await enter(
    operator,
    await tiltyard.Key.load(join(arena.folder, "validator", "key.pem")),
    "A validator",
  );

  // The task, with a hidden evaluation set.
  const dataset = join(arena.folder, "evaluation.safetensors");
  const { x, y, correct } = evaluationSet();
  await writeSafetensors(dataset, {
    x: { dtype: "F32", shape: [ROWS, FEATURES], data: x },
    y: { dtype: "I64", shape: [ROWS], data: y },
  });
  const config = TaskConfig.fromPartial({
    displayName: "The largest of three",
    validatorsPerSubmission: 1,
    models: [{ inputShape: [FEATURES], outputs: CLASSES, architecture: { $case: "linear", value: {} } }],
    evaluationDataset: {
      sha256: await tiltyard.fileDigest(dataset),
      sizeBytes: BigInt((await stat(dataset)).size),
    },
  });
  const created = await creator.tasks.createTask({ taskId: "largest", config, requestId: tiltyard.newRequestId() });
  const task = created.task?.name ?? "";
  assert.equal(task, "tasks/largest");
  await tiltyard.upload(creator, dataset, { $case: "task", value: task });
  for await (const seen of tiltyard.watch(creator.tasks.watchTask, { name: task })) {
    if (seen.task?.state === TaskState.TASK_STATE_OPEN) break;
  }

  await tiltyard.joinTask(validator, task, Role.ROLE_VALIDATOR);
  await tiltyard.joinTask(node, task, Role.ROLE_TRAINING_NODE);
  const refused = await tiltyard.joinTask(node, task, Role.ROLE_VALIDATOR).catch((error: unknown) => error);
  assert.ok(refused instanceof tiltyard.ArenaError && refused.reason !== "", String(refused));

  // A model that picks the largest feature.
  const model = join(arena.folder, "model.safetensors");
  const weight = Float32Array.from({ length: CLASSES * FEATURES }, (_, at) =>
    at % FEATURES === Math.floor(at / FEATURES) ? 1 : 0,
  );
  await writeSafetensors(model, {
    "head.weight": { dtype: "F32", shape: [CLASSES, FEATURES], data: weight },
    "head.bias": { dtype: "F32", shape: [CLASSES], data: new Float32Array(CLASSES) },
  });
  const journal = join(arena.folder, "journal.json");
  let moved = 0n;
  const progress = (bytes: bigint) => (moved = bytes);
  const submission = await tiltyard.submitModel(node, { task, path: model, journal }, { progress });
  assert.equal(moved, BigInt((await stat(model)).size));
  const again = await tiltyard.submitModel(node, { task, path: model, journal });
  assert.equal(again, submission, "the journal names one submission");

  for await (const seen of tiltyard.watch(node.leaderboard.watchLeaderboard, { task })) {
    if (seen.leaderboard?.entries.length) break;
  }
  const judged = (await node.submissions.getSubmission({ name: submission })).submission;
  assert.equal(judged?.state, SubmissionState.SUBMISSION_STATE_SCORED);
  assert.equal(judged?.score?.correct, BigInt(correct));
  assert.equal(judged?.score?.total, BigInt(ROWS));

  // Whoever trusts nobody checks the record: the log's key is in its first leaf, and signs what everybody sees.
  const genesis = await leafAt(node, 0n);
  assert.equal(genesis?.$case, "genesis");
  const { logKey, selectorKey } = genesis.value;
  const checkpoint = await checkpointOf(node, logKey);
  const witness = await tiltyard.Witness.open(join(arena.folder, "witness"));
  assert.equal((await witness.look(new tiltyard.RegistryLog(node))).size >= checkpoint.size, true);
  const drawn = await drawLeaf(node, judged.draws[0] ?? "", checkpoint.size);
  tiltyard.verifyReceipt(drawn.receipt, selectorKey);
  assert.deepEqual(drawn.receipt.picks.map(({ participant }) => participant), [validator.participant]);
  const { path } = await node.log.getInclusionProof({ index: drawn.index, treeSize: checkpoint.size });
  const leaf = tiltyard.leafHash(drawn.entry);
  const proof = { leaf, index: drawn.index, size: checkpoint.size, path, root: checkpoint.root };
  assert.ok(tiltyard.verifyInclusion(proof));
  assert.ok(!tiltyard.verifyInclusion({ ...proof, leaf: tiltyard.leafHash(drawn.entry.with(0, 0)) }));

  const forged = structuredClone(drawn.receipt);
  forged.picks[0]!.participant = creator.key.id;
  assert.throws(() => tiltyard.verifyReceipt(forged, selectorKey), tiltyard.ReceiptInvalid);

  // Closed, the task gives its creator the models; what was shown before is a beginning of what is shown now.
  await creator.tasks.closeTask({ name: task, requestId: tiltyard.newRequestId() });
  for await (const seen of tiltyard.watch(creator.tasks.watchTask, { name: task })) {
    if (seen.task?.state === TaskState.TASK_STATE_FINAL) break;
  }
  const copy = join(arena.folder, "copy.safetensors");
  await tiltyard.download(creator, `artifacts/${toHex(judged.modelDigest)}`, copy);
  assert.deepEqual(await readFile(copy), await readFile(model));
  const later = await checkpointOf(node, logKey);
  assert.ok(later.size > checkpoint.size);
  const consistency = await node.log.getConsistencyProof({ oldSize: checkpoint.size, newSize: later.size });
  const sizes = { oldSize: checkpoint.size, newSize: later.size };
  assert.ok(
    tiltyard.verifyConsistency({ ...sizes, path: consistency.path, oldRoot: checkpoint.root, newRoot: later.root }),
  );

  // The whole record, audited here and by Python; two witnesses in one folder, one after the other.
  const { record, shown } = await tiltyard.fetchShown(node);
  const found = tiltyard.audit(record, { logKey, shown });
  assert.deepEqual(found.failures, []);
  assert.deepEqual(found.leaderboards.map(({ final, entries }) => [final, entries.length]), [[true, 1]]);
  for (const claim of Object.keys(tiltyard.CLAIMS) as tiltyard.Claim[]) assert.ok(found.checked[claim] > 0, claim);
  await tiltyard.writeRecord(record, join(arena.folder, "export", "log"));
  await command("log", "watch", join(arena.folder, "witness"), "--once", "--registry", arena.address("registry"));
  const last = await witness.look(new tiltyard.RegistryLog(node));
  await witness.compare(new tiltyard.RegistryLog(node), record.note);
  const grown = await tiltyard.fetchRecord(node);
  const said = await tiltyard.witnessed(join(arena.folder, "witness"), grown.leaves, { origin: ORIGIN, logKey });
  assert.equal(said?.size, last.size);
  const verified = await command("log", "verify", join(arena.folder, "export"), "--witness", join(arena.folder, "witness"));
  assert.match(verified, /witnessed by witness-/);
});

test("errors are typed, and lists come page by page", { timeout: 60_000 }, async () => {
  const client = connect(tiltyard.Key.generate());
  const refused = await client.tasks.listTasks({ pageSize: -1 }).catch((error: unknown) => error);
  assert.ok(refused instanceof tiltyard.ArenaError);
  assert.deepEqual(refused.violations.map(({ field }) => field), ["page_size"]);

  const participants = new Set<string>();
  for await (const page of tiltyard.pages(client.participants.listParticipants, { pageSize: 1 })) {
    for (const { name } of page.participants) participants.add(name);
  }
  assert.ok(participants.size >= 3);

  using stranger = new tiltyard.Client({ key: client.key, origin: "another.arena", registry: arena.address("registry") });
  const unknown = await stranger.tasks.listTasks({}).catch((error: unknown) => error);
  assert.ok(unknown instanceof tiltyard.ArenaError && unknown.message.includes("audience"), String(unknown));
});

async function leafAt(client: tiltyard.Client, index: bigint): Promise<NonNullable<LogEntry["entry"]>> {
  const { leaves } = await client.log.listEntries({ startIndex: index, pageSize: 1 });
  const { entry } = LogEntry.decode(leaves[0]?.entry ?? new Uint8Array());
  assert.ok(entry);
  return entry;
}

async function checkpointOf(client: tiltyard.Client, logKey: Uint8Array): Promise<tiltyard.Checkpoint> {
  const { checkpoint } = await client.log.getCheckpoint({});
  return tiltyard.openCheckpoint(checkpoint?.note ?? "", { name: ORIGIN, publicKey: logKey });
}

async function drawLeaf(client: tiltyard.Client, draw: string, size: bigint) {
  for (let next = 0n; next < size; ) {
    const page = await client.log.listEntries({ startIndex: next });
    for (const { index, entry } of page.leaves) {
      const decoded = LogEntry.decode(entry).entry;
      if (decoded?.$case === "draw" && decoded.value.draw === draw) return { index, entry, receipt: decoded.value };
    }
    next = page.nextIndex;
  }
  throw new Error(`${draw} is not in the log`);
}
