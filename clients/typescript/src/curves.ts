/** Weight functions of stake (docs/sortition.md, Weights): integers only, so that any language comes to the same. */

/** A weight function. `alphaMillis` is the exponent of "power" in thousandths, 1 to 999, and 0 for the others. */
export interface Curve {
  kind: "power" | "log" | "logistic";
  alphaMillis: number;
}

const WEIGHT_SCALE = 1n << 32n;
/** Significant digits that a curve's value is rounded to. */
const DIGITS = 50;
/** Significant digits that the ratio of stake and minimum is rounded to before. */
const RATIO_DIGITS = 70;
// Numbers are integers in units of 10^-120: a ratio of two 64-bit integers with its 70 digits is exact in them, and what a
// hundred roundings leave is far behind the fiftieth digit.
const PLACES = 120;
const ONE = 10n ** BigInt(PLACES);

/**
 * The weight of a stake where `minimumMicros` is the task's minimum, which is 1 or more. Nothing weighs nothing.
 *
 * Throws RangeError for a negative stake, a minimum below 1, or an exponent that the curve does not take.
 */
export function weight(stakeMicros: bigint, { minimumMicros, curve }: { minimumMicros: bigint; curve: Curve }): bigint {
  if (stakeMicros < 0n) throw new RangeError(`a stake is 0 or more, not ${stakeMicros}`);
  if (minimumMicros < 1n) throw new RangeError(`a minimum stake is 1 or more, not ${minimumMicros}`);
  const [least, most] = curve.kind === "power" ? [1, 999] : [0, 0];
  if (curve.alphaMillis < least || curve.alphaMillis > most) {
    throw new RangeError(`a ${curve.kind} curve takes no exponent of ${curve.alphaMillis} thousandths`);
  }
  if (stakeMicros === 0n) return 0n;
  const ratio = rounded((stakeMicros * 10n ** BigInt(2 * PLACES)) / minimumMicros, RATIO_DIGITS) / ONE;
  return (rounded(evaluate(curve, ratio), DIGITS) * WEIGHT_SCALE) / ONE;
}

function evaluate({ kind, alphaMillis }: Curve, ratio: bigint): bigint {
  switch (kind) {
    case "power":
      return exp((ln(ratio) * BigInt(alphaMillis)) / 1000n);
    case "log":
      return ln(ONE + ratio);
    case "logistic":
      return (ONE * ONE) / (ONE + exp(-2n * (ratio - 2n * ONE)));
  }
}

/** A positive number with so many significant digits, half to even. */
function rounded(value: bigint, digits: number): bigint {
  const dropped = value.toString().length - digits;
  if (dropped <= 0) return value;
  const unit = 10n ** BigInt(dropped);
  const [kept, rest] = [value / unit, 2n * (value % unit)];
  const isUp = rest > unit || (rest === unit && kept % 2n === 1n);
  return (isUp ? kept + 1n : kept) * unit;
}

/** ln of a positive number: the powers of two apart, then 2 artanh((m - 1) / (m + 1)) of what lies around 1. */
function ln(value: bigint): bigint {
  const twos = BigInt(value.toString(2).length - ONE.toString(2).length);
  const mantissa = twos >= 0n ? value >> twos : value << -twos;
  return twos * LN_2 + doubleArtanh(((mantissa - ONE) * ONE) / (mantissa + ONE));
}

function doubleArtanh(value: bigint): bigint {
  const square = (value * value) / ONE;
  let sum = 0n;
  for (let power = value, odd = 1n; power !== 0n; power = (power * square) / ONE, odd += 2n) sum += power / odd;
  return 2n * sum;
}

const LN_2 = doubleArtanh(ONE / 3n);

/** e to a power: whole powers of two apart, then the series. */
function exp(value: bigint): bigint {
  // Further down nothing is left of it in these units.
  if (value < -1000n * ONE) return 0n;
  const twos = value / LN_2;
  const rest = value - twos * LN_2;
  let sum = 0n;
  for (let term = ONE, n = 1n; term !== 0n; term = (term * rest) / (ONE * n), n += 1n) sum += term;
  return twos >= 0n ? sum << twos : sum >> -twos;
}
