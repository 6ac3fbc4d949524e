/** What a registry shows beside its log, to be held against it. */

import type { Client } from "../client.js";
import type { Leaderboard } from "../proto/tiltyard/registry/v1/leaderboard.js";
import { RegistryLog, fetchRecord, type RecordLog } from "../recordlog.js";
import { persist, type Patient } from "../watching.js";
import { audit } from "./claims.js";

const GROWING_LOG_TRIES = 3;

/**
 * The whole log, and the rankings that the registry shows; both once more where it has grown between the two, and no rankings
 * where it grows all the time. Throws InvalidRecord, ArenaError.
 */
export async function fetchShown(
  client: Client,
  patient: Patient = {},
): Promise<{ record: RecordLog; shown: readonly Leaderboard[] }> {
  const { signal } = patient;
  let record = await fetchRecord(client, patient);
  for (let tries = 0; tries < GROWING_LOG_TRIES; tries += 1) {
    const shown: Leaderboard[] = [];
    for (const { task } of audit(record).leaderboards) {
      const asked = () => client.leaderboard.getLeaderboard({ task }, { signal });
      const { leaderboard } = await persist(asked, patient);
      if (leaderboard) shown.push(leaderboard);
    }
    const { size } = await new RegistryLog(client, patient).checkpoint();
    if (size === BigInt(record.leaves.length)) return { record, shown };
    record = await fetchRecord(client, patient);
  }
  return { record, shown: [] };
}
