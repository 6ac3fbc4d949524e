import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { mkdtemp, readFile, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { Status } from "nice-grpc";

import { ArenaError, DigestMismatch, download, upload, type Client } from "../src/index.js";
import type { UploadArtifactRequest } from "../src/proto/tiltyard/registry/v1/artifact.js";

let folder: string;

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "tiltyard-transfers-"));
});

after(() => rm(folder, { recursive: true }));

/**
 * A client of a registry that fails in this way when it is asked for the first time, and when it is sent the file for the
 * first.
 */
function patchy(code: Status, reason = "", retryAfterS?: number): { client: Client; asked: string[] } {
  const asked: string[] = [];
  const answer = <Value>(method: string, value: Value): Promise<Value> => {
    asked.push(method);
    const isFirst = asked.filter((each) => each === method).length === 1;
    return isFirst ? Promise.reject(new ArenaError(code, "away", reason, {}, [], retryAfterS)) : Promise.resolve(value);
  };
  const artifacts = {
    getUpload: () => answer("getUpload", { complete: false, offset: 0n }),
    uploadArtifact: () => answer("uploadArtifact", {}),
  };
  return { client: { artifacts } as unknown as Client, asked };
}

test("an upload outlasts a server that is away when it is asked how far it got", async () => {
  const path = join(folder, "model");
  await writeFile(path, "bytes");
  const { client, asked } = patchy(Status.UNAVAILABLE);
  assert.match(await upload(client, path, { $case: "task", value: "tasks/t" }), /^artifacts\/[0-9a-f]{64}$/);
  assert.deepEqual(asked, ["getUpload", "getUpload", "uploadArtifact", "getUpload", "uploadArtifact"]);
});

test("an upload waits for as long as it is told by a server whose disk is full", async () => {
  const path = join(folder, "model");
  await writeFile(path, "bytes");
  const { client, asked } = patchy(Status.RESOURCE_EXHAUSTED, "DISK_FULL", 0.4);
  const beganAt = performance.now();
  await upload(client, path, { $case: "task", value: "tasks/t" });
  assert.equal(asked.length, 5);
  assert.ok(performance.now() - beganAt >= 799);
});

test("an upload that is refused is not tried again", async () => {
  const path = join(folder, "model");
  await writeFile(path, "bytes");
  const { client, asked } = patchy(Status.PERMISSION_DENIED);
  await assert.rejects(upload(client, path, { $case: "task", value: "tasks/t" }), ArenaError);
  assert.deepEqual(asked, ["getUpload"]);
});

test("a transfer that has taken longer than its patience outlasts a restart all the same", async (t) => {
  let now = 0;
  t.mock.method(performance, "now", () => now);
  const path = join(folder, "model");
  const content = Buffer.alloc(3_000_000, "x");
  await writeFile(path, content);
  const arrived: Buffer[] = [];
  const held = () => BigInt(arrived.reduce((sum, each) => sum + each.length, 0));
  const away = () => new ArenaError(Status.UNAVAILABLE, "away", "", {}, [], undefined);
  const slow = {
    getUpload: async () => ({ complete: false, offset: held() }),
    uploadArtifact: async (messages: AsyncIterable<UploadArtifactRequest>) => {
      for await (const { content: sent } of messages) {
        if (sent?.$case !== "chunk") continue;
        now += 100_000;
        arrived.push(Buffer.from(sent.value));
        if (arrived.length === 2) throw away();
      }
    },
    async *downloadArtifact({ offset }: { offset: bigint }) {
      now += 100_000;
      yield { chunk: content.subarray(Number(offset), Number(offset) + 1_000_000) };
      if (offset < 2_000_000n) throw away();
    },
  };
  const client = { artifacts: slow } as unknown as Client;
  const name = await upload(client, path, { $case: "task", value: "tasks/t" });
  assert.ok(Buffer.concat(arrived).equals(content));
  const artifacts = { ...slow, getArtifact: async () => ({ artifact: { sizeBytes: BigInt(content.length) } }) };
  await download({ artifacts } as unknown as Client, name, join(folder, "again"));
  assert.ok((await readFile(join(folder, "again"))).equals(content));
});

/** A client of a registry that has one artifact, of `promised`, and sends the bytes of `sent` for it. */
function stored(promised: string, sent = promised): { client: Client; name: string } {
  const artifacts = {
    getArtifact: async () => ({ artifact: { sizeBytes: BigInt(promised.length) } }),
    async *downloadArtifact({ offset }: { offset: bigint }) {
      yield { chunk: Buffer.from(sent).subarray(Number(offset)) };
    },
  };
  const name = `artifacts/${createHash("sha256").update(promised).digest("hex")}`;
  return { client: { artifacts } as unknown as Client, name };
}

test("a download goes on from its part, and begins anew where that is of another artifact", async () => {
  for (const left of ["what", "other", "what was promises", "longer than all that was promised"]) {
    const { client, name } = stored("what was promised");
    const into = await mkdtemp(join(folder, "into-"));
    await writeFile(join(into, "model.part"), left);
    await download(client, name, join(into, "model"));
    assert.equal(await readFile(join(into, "model"), "utf8"), "what was promised");
    assert.deepEqual(await readdir(into), ["model"]);
  }
});

test("a download that falls silent goes on where it was", { timeout: 60_000 }, async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const ticking = setInterval(() => t.mock.timers.tick(1_000), 1);
  try {
    const offsets: bigint[] = [];
    const { client, name } = stored("what was promised");
    const { artifacts } = client as unknown as { artifacts: Record<string, unknown> };
    artifacts.downloadArtifact = async function* ({ offset }: { offset: bigint }, { signal }: { signal: AbortSignal }) {
      offsets.push(offset);
      yield { chunk: Buffer.from("what was promised").subarray(Number(offset), Number(offset) + 9) };
      if (offsets.length > 1) return;
      await once(signal, "abort");
      throw new DOMException("ended", "AbortError");
    };
    const path = join(await mkdtemp(join(folder, "into-")), "model");
    await download(client, name, path);
    assert.equal(await readFile(path, "utf8"), "what was promised");
    assert.deepEqual(offsets, [0n, 9n]);
  } finally {
    clearInterval(ticking);
  }
});

test("bytes of another digest are deleted, after a part was found, too", async () => {
  for (const left of ["", "what was"]) {
    const { client, name } = stored("what was promised", "what was not said");
    const into = await mkdtemp(join(folder, "into-"));
    await writeFile(join(into, "model.part"), left);
    await assert.rejects(download(client, name, join(into, "model")), DigestMismatch);
    assert.deepEqual(await readdir(into), []);
  }
});
