/** Keys under a passphrase: PKCS #8 with scrypt and AES-256 (RFC 7914, 7; RFC 8018, 6.2), byte for byte as Python's client. */

import { createCipheriv, randomBytes, scrypt } from "node:crypto";
import { promisify } from "node:util";

import { bigEndian, fromHex } from "./bytes.js";

const SALT_BYTES = 16;
const AES_BLOCK_BYTES = 16;
const AES_KEY_BYTES = 32;
const COSTS = { N: 2 ** 14, r: 8, p: 5 };
const PBES2 = fromHex("06092a864886f70d01050d");
const SCRYPT = fromHex("06092b06010401da47040b");
const AES256_CBC = fromHex("060960864801650304012a");
const [INTEGER, OCTETS, SEQUENCE] = [0x02, 0x04, 0x30];

const derived = promisify<string, Uint8Array, number, typeof COSTS, Buffer>(scrypt);

/** PEM of a PKCS #8 key (DER), encrypted. Node's own export would leave a passphrase open to 2,048 rounds of SHA-256. */
export async function encryptedPem(key: Uint8Array, passphrase: string): Promise<string> {
  const [salt, iv] = [randomBytes(SALT_BYTES), randomBytes(AES_BLOCK_BYTES)];
  const cipher = createCipheriv("aes-256-cbc", await derived(passphrase, salt, AES_KEY_BYTES, COSTS), iv);
  const encrypted = Buffer.concat([cipher.update(key), cipher.final()]);
  const costs = [COSTS.N, COSTS.r, COSTS.p].map((cost) => der(INTEGER, bigEndian(cost, cost < 0x80 ? 1 : 2)));
  const derivation = der(SEQUENCE, SCRYPT, der(SEQUENCE, der(OCTETS, salt), ...costs));
  const encryption = der(SEQUENCE, AES256_CBC, der(OCTETS, iv));
  const algorithm = der(SEQUENCE, PBES2, der(SEQUENCE, derivation, encryption));
  const text = der(SEQUENCE, algorithm, der(OCTETS, encrypted)).toString("base64");
  const lines = text.match(/.{1,64}/g) ?? [];
  return ["-----BEGIN ENCRYPTED PRIVATE KEY-----", ...lines, "-----END ENCRYPTED PRIVATE KEY-----", ""].join("\n");
}

/** One value of DER, shorter than 256 bytes. */
function der(tag: number, ...parts: Uint8Array[]): Buffer {
  const content = Buffer.concat(parts);
  const length = content.length < 0x80 ? [content.length] : [0x81, ...bigEndian(content.length, 1)];
  return Buffer.concat([Buffer.of(tag, ...length), content]);
}
