/** A real arena for tests: the registry, selector, trainer and validator of `tiltyard up` on free ports. */

import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";

import { TILTYARD } from "./python.js";

/** A running arena; `folder` holds its keys, and is removed with it. */
export class Arena {
  private constructor(
    private readonly process: ChildProcess,
    readonly folder: string,
    private readonly addresses: Map<string, string>,
  ) {}

  /** Starts one and waits until every service serves. */
  static async start(): Promise<Arena> {
    const folder = await mkdtemp(join(tmpdir(), "tiltyard-arena-"));
    const child = spawn(TILTYARD, ["up", "--state", folder, "--port-base", "0"], { stdio: ["ignore", "pipe", "inherit"] });
    const started = (async () => {
      for await (const line of createInterface({ input: child.stdout })) {
        if (line.startsWith("ready ")) {
          return new Map(line.split(" ").slice(1).map((each) => each.split("=") as [string, string]));
        }
      }
      throw new Error("tiltyard up ended before it was ready");
    })();
    const failed = once(child, "error").then(([error]) => Promise.reject(error));
    return new Arena(child, folder, await Promise.race([started, failed]));
  }

  /** Address of a service. */
  address(service: "registry" | "selector" | "trainer" | "validator"): string {
    const address = this.addresses.get(service);
    if (address === undefined) throw new Error(`no ${service} in the ready line`);
    return address;
  }

  /** Stops it and removes its state. */
  async stop(): Promise<void> {
    const exited = this.process.exitCode === null ? once(this.process, "exit") : undefined;
    this.process.kill("SIGTERM");
    await exited;
    await rm(this.folder, { recursive: true });
  }
}
