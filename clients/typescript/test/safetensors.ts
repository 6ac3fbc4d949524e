/** Writes safetensors files: eight bytes of header length, a JSON header, the tensors' bytes. */

import { writeFile } from "node:fs/promises";

/** A tensor by dtype (`F32`, `I64`), shape and little-endian bytes. */
export interface Tensor {
  dtype: string;
  shape: number[];
  data: Float32Array | BigInt64Array;
}

/** Writes named tensors to a file. */
export async function writeSafetensors(path: string, tensors: Record<string, Tensor>): Promise<void> {
  const header: Record<string, unknown> = {};
  const bodies: Buffer[] = [];
  let at = 0;
  for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
    header[name] = { dtype, shape, data_offsets: [at, at + data.byteLength] };
    bodies.push(Buffer.from(data.buffer, data.byteOffset, data.byteLength));
    at += data.byteLength;
  }
  const text = Buffer.from(JSON.stringify(header));
  const padded = Buffer.concat([text, Buffer.alloc((8 - (text.length % 8)) % 8, " ")]);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(padded.length));
  await writeFile(path, Buffer.concat([length, padded, ...bodies]));
}
