/** Moments and lengths of time in nanoseconds. */

import type { Duration } from "../proto/google/protobuf/duration.js";
import type { Timestamp } from "../proto/google/protobuf/timestamp.js";
import { demand, type Claim } from "./wrong.js";

const SECOND_NS = 1_000_000_000;
// The first second of the year 1, and the last of 9999.
const FIRST_S = -62_135_596_800n;
const LAST_S = 253_402_300_799n;

/** A moment since 1970, 0 where none is named. Throws Wrong, saying of `what` it is, for one that there is not. */
export function momentNs(time: Timestamp | undefined, claim: Claim, what: string): bigint {
  const { seconds, nanos } = time ?? { seconds: 0n, nanos: 0 };
  const isTime = seconds >= FIRST_S && seconds <= LAST_S && nanos >= 0 && nanos < SECOND_NS;
  demand(isTime, claim, `${what} bears a time that there is not`);
  return seconds * BigInt(SECOND_NS) + BigInt(nanos);
}

/** A length of time, 0 where none is named. */
export function durationNs(duration: Duration | undefined): bigint {
  return duration ? duration.seconds * BigInt(SECOND_NS) + BigInt(duration.nanos) : 0n;
}
