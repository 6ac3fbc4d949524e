/** The selector's ledger rebuilt from its events: every account, every owner group, and every pool with its root. */

import { weight, type Curve } from "../curves.js";
import { LedgerEventKind, StakeFault, type LedgerEvent } from "../proto/tiltyard/type/v1/stake.js";
import { Curve as CurveKind, type SelectionPolicy, type TaskConfig } from "../proto/tiltyard/type/v1/task.js";
import { SumTree } from "../sumtree.js";
import { momentNs } from "./moments.js";
import { keyOf } from "./story.js";
import { demand, told } from "./wrong.js";

const WEIGHT_SHOWN = (1n << 64n) - 1n;
const CURVES = new Map<CurveKind, Curve["kind"]>([
  [CurveKind.CURVE_UNSPECIFIED, "power"],
  [CurveKind.CURVE_POWER, "power"],
  [CurveKind.CURVE_LOG, "log"],
  [CurveKind.CURVE_LOGISTIC, "logistic"],
]);
const DEFAULT_ALPHA_MILLIS = 500;
/** Thousandths of available, locked and unbonding stake together. */
const COST_MILLIS = new Map<StakeFault, bigint>([
  [StakeFault.STAKE_FAULT_SEAL_MISSING, 1n],
  [StakeFault.STAKE_FAULT_SEAL_NOT_OPENED, 10n],
  [StakeFault.STAKE_FAULT_REPORT_OUTSIDE_TOLERANCE, 50n],
  [StakeFault.STAKE_FAULT_CONTRADICTION, 1000n],
]);

/** A pool at one moment, as a receipt names it. */
export interface PoolState {
  root: Uint8Array;
  weight: bigint;
  size: bigint;
}

class Account {
  available = 0n;
  unbonding = 0n;
  /** By task. */
  readonly locked = new Map<string, bigint>();
  /** Every available amount there has been. */
  readonly balances = new Set([0n]);

  /** All of it, wherever it is. */
  get stakeMicros(): bigint {
    return [...this.locked.values()].reduce((sum, each) => sum + each, this.available + this.unbonding);
  }

  move({ available = 0n, unbonding = 0n }): void {
    this.available += available;
    this.unbonding += unbonding;
    const isCovered = this.available >= 0n && this.unbonding >= 0n;
    demand(isCovered, "ledger", "more is taken from an account than it holds");
    this.balances.add(this.available);
  }
}

class Pool {
  readonly #tree = new SumTree();
  /** Index of each owner group's leaf. */
  readonly #leaves = new Map<string, number>();
  /** Of each owner group. */
  readonly #stakes = new Map<string, bigint>();
  /** Owner group and stake of each validator that counts. */
  readonly #seats = new Map<string, { group: string; stake: bigint }>();
  readonly #minimumMicros: bigint;
  readonly #curve: Curve;

  /** Throws Error for a policy that weighs nothing. */
  constructor(selection: SelectionPolicy | undefined) {
    const kind = CURVES.get(selection?.curve ?? CurveKind.CURVE_UNSPECIFIED);
    if (!kind) throw new RangeError(`there is no curve ${selection?.curve}`);
    this.#curve = { kind, alphaMillis: kind === "power" ? selection?.alphaMillis || DEFAULT_ALPHA_MILLIS : 0 };
    this.#minimumMicros = selection?.validatorMinStakeMicros ?? 0n;
    this.weigh(0n);
  }

  weigh(stakeMicros: bigint): bigint {
    return weight(stakeMicros, { minimumMicros: this.#minimumMicros, curve: this.#curve });
  }

  isSeated(participant: string): boolean {
    return this.#seats.has(participant);
  }

  seat(participant: string, group: string, stake: bigint): void {
    this.#seats.set(participant, { group, stake });
    this.#change(group, stake);
  }

  unseat(participant: string): void {
    const seat = this.#seats.get(participant);
    this.#seats.delete(participant);
    if (seat) this.#change(seat.group, -seat.stake);
  }

  state(): PoolState {
    return { root: this.#tree.root(), weight: this.#tree.total, size: BigInt(this.#tree.size) };
  }

  #change(group: string, by: bigint): void {
    const stake = (this.#stakes.get(group) ?? 0n) + by;
    this.#stakes.set(group, stake);
    const leaf = this.#leaves.get(group);
    if (leaf === undefined) this.#leaves.set(group, this.#tree.append(group, this.weigh(stake)));
    else this.#tree.setWeight(leaf, this.weigh(stake));
  }
}

/** Follows the events one by one. `configOf` gives a task as it is configured; undefined for one that was never created. */
export class Ledger {
  /** The pool of each draw as it was when its first place was charged. */
  readonly drawn = new Map<string, PoolState>();
  sequence = 0n;
  lastTimeNs = 0n;
  readonly #accounts = new Map<string, Account>();
  readonly #pools = new Map<string, Pool>();
  /** Whether each charge has been given back, by the key of draw and participant. */
  readonly #charges = new Map<string, boolean>();

  constructor(private readonly configOf: (task: string) => TaskConfig | undefined) {}

  /** Whether this much of somebody's stake was available at some moment. */
  had(participant: string, availableMicros: bigint): boolean {
    return this.#account(participant).balances.has(availableMicros);
  }

  /** Whether a charge has been given back; undefined where there was none. */
  isGivenBack(draw: string, participant: string): boolean | undefined {
    return this.#charges.get(keyOf(draw, participant));
  }

  /** The next event. Throws Wrong. */
  take(event: LedgerEvent): void {
    const what = `ledger event ${event.sequence}`;
    demand(event.sequence === this.sequence + 1n, "ledger", `${what} follows ${this.sequence}`);
    this.sequence = event.sequence;
    demand(event.time !== undefined, "ledger", `${what} bears no time`);
    const timeNs = momentNs(event.time, "ledger", what);
    if (timeNs > this.lastTimeNs) this.lastTimeNs = timeNs;
    const step = STEPS.get(event.kind);
    demand(step !== undefined, "ledger", `${what} is of an unknown kind`);
    demand(event.amountMicros >= 0n, "ledger", `${what} moves less than nothing`);
    step.call(this, event);
  }

  deposited({ participant, amountMicros }: LedgerEvent): void {
    this.#account(participant).move({ available: amountMicros });
  }

  withdrawalRequested({ participant, amountMicros }: LedgerEvent): void {
    this.#account(participant).move({ available: -amountMicros, unbonding: amountMicros });
  }

  withdrawn({ participant, amountMicros }: LedgerEvent): void {
    this.#account(participant).move({ unbonding: -amountMicros });
  }

  locked({ participant, task, amountMicros }: LedgerEvent): void {
    const account = this.#account(participant);
    account.move({ available: -amountMicros });
    account.locked.set(task, (account.locked.get(task) ?? 0n) + amountMicros);
  }

  unlocked({ participant, task, amountMicros }: LedgerEvent): void {
    const account = this.#account(participant);
    const held = account.locked.get(task) ?? 0n;
    account.locked.delete(task);
    demand(held === amountMicros, "ledger", `${participant} had another amount locked for ${task}`);
    account.move({ available: amountMicros });
  }

  /** From what is available, then from what is locked in order of the tasks, then from what is unbonding. */
  slashed({ participant, amountMicros, fault }: LedgerEvent): void {
    const account = this.#account(participant);
    // Rounded up, so that no stake is too small.
    const costs = (account.stakeMicros * (COST_MILLIS.get(fault) ?? 0n) + 999n) / 1000n;
    const otherwise = `${participant} is slashed by ${amountMicros}, its fault costs ${costs}`;
    demand(amountMicros === costs, "ledger", otherwise);
    let left = amountMicros;
    const least = (most: bigint) => (left < most ? left : most);
    let taken = least(account.available);
    account.move({ available: -taken });
    left -= taken;
    // In the order of their UTF-8, which is that of code points.
    for (const task of [...account.locked.keys()].sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)))) {
      const held = account.locked.get(task)!;
      taken = least(held);
      account.locked.set(task, held - taken);
      left -= taken;
    }
    account.move({ unbonding: -left });
  }

  poolOpened({ task }: LedgerEvent): void {
    const config = this.configOf(task);
    demand(config !== undefined, "ledger", `a pool is opened for ${task}, which was never created`);
    demand(!this.#pools.has(task), "ledger", `the pool of ${task} is opened twice`);
    let pool: Pool | undefined;
    let reason = "";
    try {
      pool = new Pool(config.selection);
    } catch (error) {
      reason = told(error);
    }
    demand(pool !== undefined, "ledger", `no pool can be weighed by the policy of ${task}: ${reason}`);
    this.#pools.set(task, pool);
  }

  candidateAdded(event: LedgerEvent): void {
    const pool = this.#pool(event);
    if (event.weight === 0n) return;
    const isNew = !pool.isSeated(event.participant);
    demand(isNew, "ledger", `${event.participant} enters the pool of ${event.task} twice`);
    this.#seat(pool, event);
  }

  candidateRemoved(event: LedgerEvent): void {
    this.#pool(event).unseat(event.participant);
  }

  weightChanged(event: LedgerEvent): void {
    const pool = this.#pool(event);
    pool.unseat(event.participant);
    if (event.weight !== 0n) this.#seat(pool, event);
  }

  poolClosed(event: LedgerEvent): void {
    this.#pool(event);
  }

  quotaCharged(event: LedgerEvent): void {
    const { draw, participant } = event;
    const pool = this.#pool(event);
    const key = keyOf(draw, participant);
    demand(!this.#charges.has(key), "ledger", `${participant} is charged twice for ${draw}`);
    if (!this.drawn.has(draw)) this.drawn.set(draw, pool.state());
    this.#charges.set(key, false);
  }

  quotaRefunded({ draw, participant }: LedgerEvent): void {
    const key = keyOf(draw, participant);
    const isOwed = this.#charges.get(key) === false;
    demand(isOwed, "ledger", `${participant} is refunded for ${draw}, which was never charged, or twice`);
    this.#charges.set(key, true);
  }

  /** Members who sit in a pool are told of by a WEIGHT_CHANGED each. */
  ownerGroupsMerged(): void {}

  #account(participant: string): Account {
    const account = this.#accounts.get(participant) ?? new Account();
    this.#accounts.set(participant, account);
    return account;
  }

  #pool({ task }: LedgerEvent): Pool {
    const pool = this.#pools.get(task);
    demand(pool !== undefined, "ledger", `${task} has no pool`);
    return pool;
  }

  #seat(pool: Pool, event: LedgerEvent): void {
    const { participant, task } = event;
    const stake = this.#account(participant).locked.get(task) ?? 0n;
    const weighs = pool.weigh(stake);
    const expected = weighs < WEIGHT_SHOWN ? weighs : WEIGHT_SHOWN;
    const otherwise = `${participant} weighs ${event.weight} in ${task}, its stake gives ${expected}`;
    demand(event.weight === expected, "ledger", otherwise);
    pool.seat(participant, event.ownerGroup, stake);
  }
}

const STEPS = new Map<LedgerEventKind, (this: Ledger, event: LedgerEvent) => void>([
  [LedgerEventKind.LEDGER_EVENT_KIND_DEPOSITED, Ledger.prototype.deposited],
  [LedgerEventKind.LEDGER_EVENT_KIND_LOCKED, Ledger.prototype.locked],
  [LedgerEventKind.LEDGER_EVENT_KIND_UNLOCKED, Ledger.prototype.unlocked],
  [LedgerEventKind.LEDGER_EVENT_KIND_WITHDRAWAL_REQUESTED, Ledger.prototype.withdrawalRequested],
  [LedgerEventKind.LEDGER_EVENT_KIND_WITHDRAWN, Ledger.prototype.withdrawn],
  [LedgerEventKind.LEDGER_EVENT_KIND_SLASHED, Ledger.prototype.slashed],
  [LedgerEventKind.LEDGER_EVENT_KIND_POOL_OPENED, Ledger.prototype.poolOpened],
  [LedgerEventKind.LEDGER_EVENT_KIND_CANDIDATE_ADDED, Ledger.prototype.candidateAdded],
  [LedgerEventKind.LEDGER_EVENT_KIND_CANDIDATE_REMOVED, Ledger.prototype.candidateRemoved],
  [LedgerEventKind.LEDGER_EVENT_KIND_POOL_CLOSED, Ledger.prototype.poolClosed],
  [LedgerEventKind.LEDGER_EVENT_KIND_QUOTA_CHARGED, Ledger.prototype.quotaCharged],
  [LedgerEventKind.LEDGER_EVENT_KIND_QUOTA_REFUNDED, Ledger.prototype.quotaRefunded],
  [LedgerEventKind.LEDGER_EVENT_KIND_WEIGHT_CHANGED, Ledger.prototype.weightChanged],
  [LedgerEventKind.LEDGER_EVENT_KIND_OWNER_GROUPS_MERGED, Ledger.prototype.ownerGroupsMerged],
]);
