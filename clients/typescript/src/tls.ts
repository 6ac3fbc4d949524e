/** TLS of a client: PEM texts, or PEM files that may be replaced at any time and are read again when they change. */

import { X509Certificate, createPrivateKey } from "node:crypto";
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";

import { ChannelCredentials, experimental } from "@grpc/grpc-js";
import type { CallOptions, ClientMiddleware, ClientMiddlewareCall } from "nice-grpc";

const LOOK_EVERY_MS = 1_000;

/**
 * The authority that the servers must have (left out: those that Node trusts), and for mutual TLS the own certificate and
 * key. A Buffer is the PEM text; a string is the path of its file, which may be replaced while the client runs.
 */
export interface TlsOptions {
  ca?: Buffer | string;
  certificate?: Buffer | string;
  key?: Buffer | string;
}

/** PEM that can't be used, alone or together; the message names the file. */
export class InvalidPem extends Error {
  override readonly name = "InvalidPem";
}

interface Pem {
  ca?: Buffer;
  certificate?: Buffer;
  key?: Buffer;
}

/**
 * The last good content of PEM files, for each connection that is made. While they are being replaced, or hold nonsense, the
 * earlier one stays, and a warning says so once.
 */
export class FollowedPem implements experimental.CertificateProvider {
  readonly #caListeners = new Set<experimental.CaCertificateUpdateListener>();
  readonly #identityListeners = new Set<experimental.IdentityCertificateUpdateListener>();
  #pem: Pem;
  #lookedAt = performance.now();
  #complaint = "";

  /** Reads the files. Throws InvalidPem, or the file system's error for a file that is not there. */
  constructor(
    private readonly tls: TlsOptions,
    private readonly lookEveryMs: number = LOOK_EVERY_MS,
  ) {
    const read = (from: Buffer | string | undefined) => (typeof from === "string" ? readFileSync(from) : from);
    this.#pem = { ca: read(tls.ca), certificate: read(tls.certificate), key: read(tls.key) };
    check(tls, this.#pem);
  }

  /** Credentials of a channel whose connections are each made with what was good by then. */
  credentials(): ChannelCredentials {
    return experimental.createCertificateProviderChannelCredentials(this, this.#pem.certificate ? this : null);
  }

  /** Reads the files again, once a second at most; what has changed is for the connections from then on. */
  async look(): Promise<void> {
    if (performance.now() - this.#lookedAt < this.lookEveryMs) return;
    this.#lookedAt = performance.now();
    const read = async (from: Buffer | string | undefined) => (typeof from === "string" ? readFile(from) : from);
    const { tls } = this;
    try {
      const [ca, certificate, key] = await Promise.all([read(tls.ca), read(tls.certificate), read(tls.key)]);
      check(tls, { ca, certificate, key });
      this.#pem = { ca, certificate, key };
      this.#complaint = "";
    } catch (error) {
      // Perhaps half replaced: the next look finds the rest.
      const complaint = `certificates can't be read again, the earlier ones stay: ${(error as Error).message}`;
      if (complaint !== this.#complaint) process.emitWarning(complaint);
      this.#complaint = complaint;
      return;
    }
    for (const listener of this.#caListeners) this.#tellCa(listener);
    for (const listener of this.#identityListeners) this.#tellIdentity(listener);
  }

  addCaCertificateListener(listener: experimental.CaCertificateUpdateListener): void {
    this.#caListeners.add(listener);
    this.#tellCa(listener);
  }

  removeCaCertificateListener(listener: experimental.CaCertificateUpdateListener): void {
    this.#caListeners.delete(listener);
  }

  addIdentityCertificateListener(listener: experimental.IdentityCertificateUpdateListener): void {
    this.#identityListeners.add(listener);
    this.#tellIdentity(listener);
  }

  removeIdentityCertificateListener(listener: experimental.IdentityCertificateUpdateListener): void {
    this.#identityListeners.delete(listener);
  }

  #tellCa(listener: experimental.CaCertificateUpdateListener): void {
    // It goes to tls.createSecureContext, to which none means those that Node trusts.
    listener({ caCertificate: this.#pem.ca as Buffer });
  }

  #tellIdentity(listener: experimental.IdentityCertificateUpdateListener): void {
    const { certificate, key } = this.#pem;
    if (certificate && key) listener({ certificate, privateKey: key });
  }
}

/** Client middleware: the files are looked at before a call. */
export function following(pem: FollowedPem): ClientMiddleware {
  return async function* withPem<Request, Response>(call: ClientMiddlewareCall<Request, Response>, options: CallOptions) {
    await pem.look();
    return yield* call.next(call.request, options);
  };
}

/** The key must be that of the certificate: two files are never replaced in one step. */
function check(tls: TlsOptions, { ca, certificate, key }: Pem): void {
  const named = (from: Buffer | string | undefined, what: string) => (typeof from === "string" ? from : `the ${what}`);
  const parsed = <Value>(parse: () => Value, complaint: string): Value => {
    try {
      return parse();
    } catch (error) {
      throw new InvalidPem(complaint, { cause: error });
    }
  };
  if (ca) parsed(() => new X509Certificate(ca), `${named(tls.ca, "authority")} holds no PEM certificate`);
  if (!certificate !== !key) throw new InvalidPem("a certificate and its key go together");
  if (!certificate || !key) return;
  const [certificateName, keyName] = [named(tls.certificate, "certificate"), named(tls.key, "key")];
  const leaf = parsed(() => new X509Certificate(certificate), `${certificateName} holds no PEM certificate`);
  const own = parsed(() => createPrivateKey(key), `${keyName} holds no unencrypted PEM key`);
  if (!leaf.checkPrivateKey(own)) throw new InvalidPem(`${keyName} is not the key of ${certificateName}`);
}
