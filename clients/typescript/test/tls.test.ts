import assert from "node:assert/strict";
import { once } from "node:events";
import { cp, copyFile, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as wait } from "node:timers/promises";

import { ServerCredentials } from "@grpc/grpc-js";
import { createServer, type Server } from "nice-grpc";

import { Client, InvalidPem, Key, persist, type TlsOptions } from "../src/index.js";
import { TaskServiceDefinition } from "../src/proto/tiltyard/registry/v1/task.js";
import { FollowedPem } from "../src/tls.js";
import { tiltyard } from "./python.js";

const { closeTask } = TaskServiceDefinition.methods;

let folder: string;
const open: { close?(): void; forceShutdown?(): void }[] = [];

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "tiltyard-tls-"));
  await Promise.all(["first", "second"].map((name) => tiltyard("certs", "dev", join(folder, name))));
});

after(async () => {
  for (const each of open) (each.close ?? each.forceShutdown)?.call(each);
  await rm(folder, { recursive: true });
});

function files(of: string, name = "client"): { ca: string; certificate: string; key: string } {
  return { ca: join(folder, of, "ca.pem"), certificate: join(folder, of, `${name}.pem`), key: join(folder, of, `${name}.key`) };
}

async function texts(of: string, name = "client"): Promise<{ ca: Buffer; certificate: Buffer; key: Buffer }> {
  const { ca, certificate, key } = files(of, name);
  return { ca: await readFile(ca), certificate: await readFile(certificate), key: await readFile(key) };
}

/** A registry that closes tasks; with `authority`, for whoever shows one of its certificates. */
async function serving(address: string, authority?: string): Promise<{ server: Server; port: number }> {
  const server = createServer();
  server.add({ ...TaskServiceDefinition, methods: { closeTask } } as const, { closeTask: async () => ({}) });
  open.push(server);
  if (authority === undefined) return { server, port: await server.listen(address) };
  const { ca, certificate, key } = await texts(authority, "registry");
  const credentials = ServerCredentials.createSsl(ca, [{ cert_chain: certificate, private_key: key }], true);
  return { server, port: await server.listen(address, credentials) };
}

function connected(registry: string, tls: TlsOptions): Client {
  const client = new Client({ key: Key.generate(), origin: "arena", registry, tls });
  open.push(client);
  return client;
}

test("new connections go by the files as they are then", { timeout: 60_000 }, async () => {
  const { server, port } = await serving("127.0.0.1:0", "first");
  await cp(join(folder, "first"), join(folder, "own"), { recursive: true });
  const following = connected(`localhost:${port}`, files("own"));
  const fixed = connected(`localhost:${port}`, await texts("own"));
  for (const client of [following, fixed]) await client.tasks.closeTask({ name: "tasks/t" });
  server.forceShutdown();
  await serving(`127.0.0.1:${port}`, "second");
  for (const name of ["ca.pem", "client.pem", "client.key"]) {
    await copyFile(join(folder, "second", name), join(folder, "own", name));
  }
  await wait(1_100); // they are looked at once a second at most
  await persist(() => following.tasks.closeTask({ name: "tasks/t" }));
  await assert.rejects(persist(() => fixed.tasks.closeTask({ name: "tasks/t" }), { patienceMs: 1_000 }));
});

test("while certificate and key do not fit each other the earlier ones stay, and one warning says so", async () => {
  await cp(join(folder, "first"), join(folder, "half"), { recursive: true });
  const own = files("half");
  const followed = new FollowedPem(own, 0);
  const seen: string[] = [];
  followed.addIdentityCertificateListener((update) => seen.push(String(update?.certificate)));
  const [first, second] = [String((await texts("first")).certificate), String((await texts("second")).certificate)];
  const warned = once(process, "warning");
  await copyFile(files("second").certificate, own.certificate);
  await followed.look();
  await rm(own.key);
  await followed.look();
  assert.match(String(((await warned) as [Error])[0].message), /client\.key is not the key of .*client\.pem/);
  assert.deepEqual(seen, [first]);
  await copyFile(files("second").key, own.key);
  await followed.look();
  assert.deepEqual(seen, [first, second]);
});

test("what is no PEM, or does not belong together, is refused at once", async () => {
  const nonsense = join(folder, "nonsense.pem");
  await writeFile(nonsense, "nonsense");
  const { ca, certificate, key } = files("first");
  for (const [tls, complaint] of [
    [{ ca: nonsense }, /nonsense\.pem holds no PEM certificate/],
    [{ ca, certificate, key: nonsense }, /nonsense\.pem holds no unencrypted PEM key/],
    [{ ca, certificate }, /a certificate and its key go together/],
    [{ ca, certificate, key: await readFile(files("second").key) }, /the key is not the key of .*client\.pem/],
  ] as const) {
    assert.throws(
      () => connected("localhost:1", tls),
      (error) => error instanceof InvalidPem && complaint.test(error.message),
    );
  }
  assert.throws(() => connected("localhost:1", { ca: join(folder, "missing.pem") }), { code: "ENOENT" });
});

test("a Unix socket is never encrypted", async () => {
  const address = `unix:${join(folder, "socket")}`;
  await serving(address);
  await connected(address, files("first")).tasks.closeTask({ name: "tasks/t" });
});
