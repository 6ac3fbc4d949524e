import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { mkdtemp, readFile, readdir, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { Status, createServer } from "nice-grpc";
import { RichServerError, errorDetailsServerMiddleware } from "nice-grpc-error-details";

import { toHex } from "../src/bytes.js";
import { ArenaError, Client, JournalMismatch, Key, readJournal, submissionCommitment, submitModel } from "../src/index.js";
import { ArtifactServiceDefinition, type UploadArtifactRequest } from "../src/proto/tiltyard/registry/v1/artifact.js";
import { SubmissionServiceDefinition } from "../src/proto/tiltyard/registry/v1/submission.js";
import type { CommitStatement, Envelope, RevealStatement } from "../src/proto/tiltyard/type/v1/envelope.js";
import { COMMIT, REVEAL, openStatement } from "../src/statements.js";
import { python } from "./python.js";

const ORIGIN = "tiltyard.test";
const TASK = "tasks/digits";
const { commitSubmission, revealSubmission } = SubmissionServiceDefinition.methods;
const { getUpload, uploadArtifact } = ArtifactServiceDefinition.methods;

let folder: string;
const open: { close?(): void; forceShutdown?(): void }[] = [];

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "tiltyard-submitting-"));
  await writeFile(join(folder, "model"), "a model");
});

after(async () => {
  for (const each of open) (each.close ?? each.forceShutdown)?.call(each);
  await rm(folder, { recursive: true });
});

/** Submissions in memory. What `failing` names fails with the code that it gives, once, before or after it was done. */
class SmallRegistry {
  readonly commits = new Map<string, CommitStatement>();
  readonly reveals: RevealStatement[] = [];
  readonly calls: string[] = [];
  readonly failing: { method: string; code: Status; done?: boolean }[] = [];

  #maybeFail(method: string, done = false): void {
    const at = this.failing.findIndex((each) => each.method === method && (each.done ?? false) === done);
    if (at >= 0) throw new RichServerError(this.failing.splice(at, 1)[0]!.code, "for the test", []);
  }

  async serve(): Promise<string> {
    const server = createServer().use(errorDetailsServerMiddleware);
    const [commits, reveals] = [this.commits, this.reveals];
    const begin = (method: string) => {
      this.calls.push(method);
      this.#maybeFail(method);
    };
    server.add({ ...SubmissionServiceDefinition, methods: { commitSubmission, revealSubmission } } as const, {
      commitSubmission: async ({ statement, requestId }: { statement?: Envelope; requestId: string }) => {
        begin("commit");
        // The same request id gives the same submission.
        if (!commits.has(requestId)) commits.set(requestId, openStatement(statement!, COMMIT).statement);
        this.#maybeFail("commit", true);
        return { submission: { name: `${TASK}/submissions/${[...commits.keys()].indexOf(requestId) + 1}` } };
      },
      revealSubmission: async ({ statement }: { statement?: Envelope }) => {
        begin("reveal");
        reveals.push(openStatement(statement!, REVEAL).statement);
        this.#maybeFail("reveal", true);
        return {};
      },
    });
    server.add({ ...ArtifactServiceDefinition, methods: { getUpload, uploadArtifact } } as const, {
      getUpload: async () => ({ offset: 0n, complete: false }),
      uploadArtifact: async (messages: AsyncIterable<UploadArtifactRequest>) => {
        begin("upload");
        const hash = createHash("sha256");
        let name = "";
        for await (const { content } of messages) {
          if (content?.$case === "header") name = content.value.artifact;
          if (content?.$case === "chunk") hash.update(content.value);
        }
        assert.equal(name, `artifacts/${hash.digest("hex")}`);
        return {};
      },
    });
    open.push(server);
    return `127.0.0.1:${await server.listen("127.0.0.1:0")}`;
  }
}

function connected(registry: string, key: Key = Key.generate()): Client {
  const client = new Client({ key, origin: ORIGIN, registry });
  open.push(client);
  return client;
}

/** A model and a journal that is not there yet. */
function submission(name: string) {
  return { task: TASK, path: join(folder, "model"), journal: join(folder, name, "journal.json") };
}

for (const method of ["commit", "upload", "reveal"]) {
  for (const done of [false, true]) {
    if (method === "upload" && done) continue;
    const when = done ? "after the answer was given" : "before it was heard";
    test(`a submission whose process dies at its ${method}, ${when}, goes on by its journal`, async () => {
      const registry = new SmallRegistry();
      registry.failing.push({ method, done, code: Status.PERMISSION_DENIED });
      const client = connected(await registry.serve());
      const model = submission(`${method}-${done}`);
      await assert.rejects(submitModel(client, model), ArenaError);
      const { salt } = await readJournal(model.journal);
      assert.equal(await submitModel(client, model), `${TASK}/submissions/1`);
      assert.equal(registry.commits.size, 1);
      const [commit] = registry.commits.values();
      const reveal = registry.reveals.at(-1)!;
      assert.equal(toHex(reveal.salt), salt);
      const { origin, task, participant } = commit!;
      const opened = submissionCommitment({ origin, task, participant, modelDigest: reveal.modelDigest, salt: reveal.salt });
      assert.equal(toHex(opened), toHex(commit!.commitment));
      assert.ok((await readJournal(model.journal)).revealed);
    });
  }
}

test("a finished journal needs no further call, and is nobody else's to read", async () => {
  const registry = new SmallRegistry();
  const client = connected(await registry.serve());
  const model = submission("finished");
  const name = await submitModel(client, model);
  const before = [...registry.calls];
  assert.equal(await submitModel(client, model), name);
  assert.deepEqual(registry.calls, before);
  assert.equal((await stat(model.journal)).mode & 0o777, 0o600);
});

test("a registry that is away for a moment is waited for", { timeout: 60_000 }, async () => {
  const registry = new SmallRegistry();
  // More than the channel repeats by itself.
  for (const method of ["commit", "reveal"]) {
    for (let made = 0; made < 5; made += 1) registry.failing.push({ method, code: Status.UNAVAILABLE });
  }
  await submitModel(connected(await registry.serve()), submission("away"));
  assert.equal(registry.commits.size, 1);
  assert.equal(registry.reveals.length, 1);
});

test("a journal is of one submission only, and a file that is none is left alone", async () => {
  const registry = new SmallRegistry();
  const address = await registry.serve();
  const client = connected(address);
  const model = submission("known");
  await submitModel(client, model);
  await assert.rejects(submitModel(client, { ...model, index: 1 }), /its model_index is 0/);
  await assert.rejects(submitModel(client, { ...model, task: "tasks/other" }), /its task is "tasks\/digits"/);
  await assert.rejects(submitModel(connected(address), model), JournalMismatch);
  const known = JSON.parse(await readFile(model.journal, "utf8")) as object;
  for (const text of ["", "null", "[]", "{}", JSON.stringify({ ...known, salt: 1 }), JSON.stringify({ ...known, more: 1 })]) {
    await writeFile(model.journal, text);
    await assert.rejects(submitModel(client, model), JournalMismatch, text);
    assert.equal(await readFile(model.journal, "utf8"), text);
  }
});

test("a mistyped index is mended by the next try", async () => {
  const registry = new SmallRegistry();
  registry.failing.push({ method: "reveal", code: Status.INVALID_ARGUMENT });
  const client = connected(await registry.serve());
  const model = submission("mistyped");
  await assert.rejects(submitModel(client, { ...model, index: 7 }), ArenaError);
  const { revealRequestId } = await readJournal(model.journal);
  await submitModel(client, { ...model, index: 1 });
  assert.equal(registry.commits.size, 1);
  assert.deepEqual(registry.reveals.map(({ modelIndex }) => modelIndex), [1]);
  assert.notEqual((await readJournal(model.journal)).revealRequestId, revealRequestId);
});

test("two that begin at once are one submission", async () => {
  const registry = new SmallRegistry();
  const client = connected(await registry.serve());
  const model = submission("at-once");
  const names = await Promise.all(Array.from({ length: 8 }, () => submitModel(client, model)));
  assert.equal(new Set(names).size, 1);
  assert.equal(registry.commits.size, 1);
  assert.deepEqual(await readdir(join(folder, "at-once")), ["journal.json"]);
});

test("what is aborted ends with its signal's error, and goes on when it is called again", async () => {
  const registry = new SmallRegistry();
  const client = connected(await registry.serve());
  const model = submission("aborted");
  const ending = new AbortController();
  const options = { signal: ending.signal, progress: () => ending.abort() };
  await assert.rejects(submitModel(client, model, options), { name: "AbortError" });
  assert.equal(registry.reveals.length, 0);
  await submitModel(client, model);
  assert.equal(registry.commits.size, 1);
});

test("Python goes on with a submission of ours, and we with one of Python's", { timeout: 60_000 }, async () => {
  const script = `
import asyncio, sys
from pathlib import Path
from tiltyard import Client, Key
from tiltyard.submitting import submit_model

async def main(key, registry, model, journal):
    async with Client(Key.load(Path(key)), origin="${ORIGIN}", registry=registry) as client:
        print(await submit_model(client, task="${TASK}", model=Path(model), journal=Path(journal)))

asyncio.run(main(*sys.argv[1:]))`;
  const registry = new SmallRegistry();
  const address = await registry.serve();
  const key = Key.generate();
  await key.save(join(folder, "key.pem"));
  const [ours, theirs] = [submission("ours"), submission("theirs")];
  registry.failing.push({ method: "reveal", code: Status.PERMISSION_DENIED });
  await assert.rejects(submitModel(connected(address, key), ours), ArenaError);
  assert.equal(await python(script, join(folder, "key.pem"), address, ours.path, ours.journal), `${TASK}/submissions/1`);
  assert.ok((await readJournal(ours.journal)).revealed);
  registry.failing.push({ method: "commit", done: true, code: Status.PERMISSION_DENIED });
  await assert.rejects(python(script, join(folder, "key.pem"), address, theirs.path, theirs.journal));
  assert.equal(await submitModel(connected(address, key), theirs), `${TASK}/submissions/2`);
  assert.equal(registry.commits.size, 2);
});
