import assert from "node:assert/strict";
import { mkdtemp, readFile, readdir, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { sha256, utf8 } from "../src/bytes.js";
import {
  Alarm,
  Frontier,
  InvalidNote,
  InvalidRecord,
  Key,
  Witness,
  WitnessKey,
  cosign,
  leafHash,
  verifyCosignature,
  witnessed,
  type LogSource,
} from "../src/index.js";
import { LogEntry } from "../src/proto/tiltyard/type/v1/log.js";
import { python } from "./python.js";

const ORIGIN = "tiltyard.test";
const NOW_S = 1_700_000_000;

let folder: string;

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "tiltyard-witness-"));
});

after(() => rm(folder, { recursive: true }));

/** A log whose keeper may show any leaves. */
class SmallLog implements LogSource {
  readonly key = Key.generate();
  shown: Uint8Array[];

  constructor(leaves: number) {
    const genesis = { origin: ORIGIN, logKey: this.key.publicKey, selectorKey: new Uint8Array(48), operators: [] };
    this.shown = [LogEntry.encode({ time: undefined, entry: { $case: "genesis", value: genesis } }).finish()];
    this.grow(leaves - 1);
  }

  get log() {
    return { origin: ORIGIN, logKey: this.key.publicKey };
  }

  grow(by: number): void {
    for (let made = 0; made < by; made += 1) this.shown.push(utf8(`leaf ${this.shown.length}`));
  }

  async note(): Promise<string> {
    const root = Buffer.from(root_(this.shown)).toString("base64");
    const body = `${ORIGIN}\n${this.shown.length}\n${root}\n`;
    const keyHash = sha256(utf8(`${ORIGIN}\n`), Uint8Array.of(1), this.key.publicKey).subarray(0, 4);
    const signature = Buffer.concat([keyHash, this.key.sign(utf8(body))]).toString("base64");
    return `${body}\n\u2014 ${ORIGIN} ${signature}\n`;
  }

  async *leaves(start: bigint, end: bigint): AsyncGenerator<Uint8Array> {
    yield* this.shown.slice(Number(start), Number(end));
  }

  async consistency(oldSize: bigint, newSize: bigint): Promise<Uint8Array[]> {
    return proof(this.shown.slice(0, Number(newSize)), Number(oldSize), true);
  }
}

function root_(leaves: readonly Uint8Array[]): Uint8Array {
  const tree = new Frontier();
  for (const leaf of leaves) tree.append(leafHash(leaf));
  return tree.root();
}

/** RFC 9162, 2.1.4.1, word for word. */
function proof(leaves: readonly Uint8Array[], old: number, whole: boolean): Uint8Array[] {
  if (old === leaves.length) return whole ? [] : [root_(leaves)];
  let split = 1;
  while (2 * split < leaves.length) split *= 2;
  const [left, right] = [leaves.slice(0, split), leaves.slice(split)];
  if (old <= split) return [...proof(left, old, whole), root_(right)];
  return [...proof(right, old - split, false), root_(left)];
}

async function alarms(name: string): Promise<string[]> {
  const files = await readdir(join(folder, name, "alarms"));
  return Promise.all(files.sort().map((file) => readFile(join(folder, name, "alarms", file), "utf8")));
}

test("a growing log is cosigned again and again", async () => {
  const log = new SmallLog(6);
  const where = join(folder, "growing");
  const witness = await Witness.open(where, "neighbour");
  assert.equal((await witness.look(log, NOW_S)).size, 6n);
  assert.equal((await witness.look(log, NOW_S + 1)).size, 6n);
  log.grow(7);
  assert.equal((await (await Witness.open(where)).look(log, NOW_S + 60)).size, 13n);
  const said = { name: "neighbour", size: 13n, timeS: BigInt(NOW_S + 60) };
  assert.deepEqual(await witnessed(where, log.shown, log.log), said);
  log.grow(1);
  assert.deepEqual(await witnessed(where, log.shown, log.log), said);
  assert.equal((await readdir(join(where, "checkpoints"))).length, 2);
  assert.equal((await stat(join(where, "witness.pem"))).mode & 0o777, 0o600);
  assert.deepEqual(await alarms("growing"), []);
});

test("a rewritten history raises the alarm, with both notes as evidence", async () => {
  const log = new SmallLog(6);
  const where = join(folder, "rewritten");
  const witness = await Witness.open(where);
  await witness.look(log, NOW_S);
  log.shown[3] = utf8("nimble");
  await assert.rejects(witness.look(log, NOW_S + 1), (error) => error instanceof Alarm && /does not begin with/.test(error.message));
  log.grow(5);
  await assert.rejects(witness.look(log, NOW_S + 2), /does not begin with the 6 seen/);
  await assert.rejects(witnessed(where, log.shown, log.log), /a leaf from 0 to 5 was changed/);
  const [first] = await alarms("rewritten");
  assert.equal(first?.split(`\u2014 ${ORIGIN} `).length, 3);
  assert.equal((await witness.seen())?.frontier.size, 6n);
});

test("a log that has become shorter, or shows leaves that are not under its root, raises the alarm", async () => {
  const log = new SmallLog(6);
  const witness = await Witness.open(join(folder, "shorter"));
  await witness.look(log, NOW_S);
  const all = log.shown;
  log.shown = all.slice(0, 4);
  await assert.rejects(witness.look(log, NOW_S + 1), /leaves are gone/);
  log.shown = all;
  log.grow(2);
  log.leaves = async function* () {
    yield* [utf8("one"), utf8("other")];
  };
  await assert.rejects(witness.look(log, NOW_S + 2), /do not give its root/);
  log.leaves = async function* () {
    throw new InvalidRecord("the registry does not show leaf 6");
  };
  await assert.rejects(witness.look(log, NOW_S + 3), (error) => error instanceof Alarm && /not show leaf 6/.test(error.message));
  assert.equal((await alarms("shorter")).length, 3);
});

test("a memory that was damaged is told of by its file", async () => {
  const where = join(folder, "damaged");
  const witness = await Witness.open(where);
  for (const text of ["", "{}", '{"origin": "o", "log_key": "00", "size": 1, "hashes": []}']) {
    await writeFile(join(where, "frontier.json"), text);
    await assert.rejects(witness.look(new SmallLog(2), NOW_S), /^RangeError: .*frontier.json is damaged/, text);
  }
});

test("two histories that are shown to two people are found, and a newer checkpoint is none", async () => {
  const log = new SmallLog(6);
  const theirs = await log.note();
  const witness = await Witness.open(join(folder, "forked"));
  await assert.rejects(witness.compare(log, theirs), InvalidNote);
  await witness.look(log, NOW_S);
  log.grow(3);
  assert.equal((await witness.compare(log, await log.note())).size, 9n);
  await witness.look(log, NOW_S);
  assert.equal((await witness.compare(log, theirs)).size, 6n);
  await assert.rejects(witness.compare(log, theirs.replace("\u2014 ", "\u2014 x")), InvalidNote);
  assert.deepEqual(await alarms("forked"), []);
  const other = new SmallLog(9);
  Object.assign(other, { key: log.key });
  other.shown = log.shown.with(2, utf8("nimble"));
  await assert.rejects(witness.compare(log, await other.note()), /two histories/);
  other.grow(1);
  await assert.rejects(witness.compare(log, await other.note()), /has signed 10 leaves and shows 9/);
});

test("a log without a genesis, or of another key, is not begun", async () => {
  const log = new SmallLog(2);
  const witness = await Witness.open(join(folder, "none"));
  for (const leaf of ["", "no entry"]) {
    log.shown[0] = utf8(leaf);
    await assert.rejects(witness.look(log, NOW_S), InvalidNote, leaf);
  }
  log.leaves = async function* () {
    throw new InvalidRecord("the registry does not show leaf 0");
  };
  await assert.rejects(witness.look(log, NOW_S), InvalidNote);
  const forged = new SmallLog(2);
  Object.assign(forged, { key: Key.generate() });
  await assert.rejects(witness.look(forged, NOW_S), InvalidNote);
  assert.equal(await witness.seen(), undefined);
});

test("cosignatures hold for their note and key alone", () => {
  const key = Key.generate();
  const named = new WitnessKey("w", key.publicKey);
  assert.deepEqual(WitnessKey.parse(`${named}\n`), named);
  const cosigned = cosign("origin\n1\nroot\n\n\u2014 origin AAAA\n", key, "w", NOW_S);
  assert.equal(verifyCosignature(cosigned, named), BigInt(NOW_S));
  for (const [changed, who] of [
    [cosigned.replace("root", "riot"), named],
    [cosigned, new WitnessKey("w", Key.generate().publicKey)],
    [cosigned, new WitnessKey("v", key.publicKey)],
    [cosigned.replace(/.{9}\n$/, "AAAAAAAA\n"), named],
    ["no note", named],
  ] as const) {
    assert.throws(() => verifyCosignature(changed, who), InvalidNote);
  }
  for (const text of ["", "w", "w+00000000+AAAA", `${named}`.slice(0, -2), `${named}`.replace("w+", "v+")]) {
    assert.throws(() => WitnessKey.parse(text), RangeError, text);
  }
  for (const name of ["", "a b", "a+b", "a\u0000", "a\u00a0b"]) {
    assert.throws(() => new WitnessKey(name, key.publicKey), RangeError, name);
  }
});

test("Python goes on with a witness of ours, and we with one of Python's", { timeout: 60_000 }, async () => {
  const script = `
import asyncio, base64, json, sys
from pathlib import Path
from tiltyard.transparency import Frontier, leaf_hash
from tiltyard.witness import Witness, witnessed

class Log:
    def __init__(self, told):
        self.told = told
        self.shown = [base64.b64decode(each) for each in told["leaves"]]
    async def note(self): return self.told["note"]
    async def leaves(self, *, start, end): return self.shown[start:end]
    async def consistency(self, *, old_size, new_size): return [base64.b64decode(each) for each in self.told["path"]]

log = Log(json.loads(Path(sys.argv[2]).read_text()))
witness = Witness(Path(sys.argv[1]))
asyncio.run(witness.look(log, now_s=${NOW_S}))
said = witnessed(Path(sys.argv[1]), leaf_hashes=[leaf_hash(each) for each in log.shown],
                 log_key=bytes.fromhex(log.told["key"]), origin="${ORIGIN}")
print(json.dumps([said.name, said.size, said.time_s]))`;
  const log = new SmallLog(6);
  const where = join(folder, "shared");
  const witness = await Witness.open(where);
  await witness.look(log, NOW_S - 1);
  const told = async () => {
    log.grow(5);
    const before = BigInt(log.shown.length - 5);
    const base64 = (bytes: Uint8Array) => Buffer.from(bytes).toString("base64");
    const path = (await log.consistency(before, before + 5n)).map(base64);
    const key = Buffer.from(log.key.publicKey).toString("hex");
    const document = { note: await log.note(), leaves: log.shown.map(base64), path, key };
    await writeFile(join(folder, "told.json"), JSON.stringify(document));
    return JSON.parse(await python(script, where, join(folder, "told.json"))) as unknown;
  };
  assert.deepEqual(await told(), [witness.verifier.name, 11, NOW_S]);
  log.grow(1);
  await witness.look(log, NOW_S + 1);
  assert.deepEqual(await witnessed(where, log.shown, log.log), { name: witness.verifier.name, size: 12n, timeS: BigInt(NOW_S + 1) });
  assert.deepEqual(await told(), [witness.verifier.name, 17, NOW_S]);
});
