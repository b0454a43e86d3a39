// @ts-check
/** Calculations for the chart. */

/**
 * Bias-corrected exponential moving average over about `window` values, as in trainer_core's chart.
 * @param {number[]} values
 * @param {number} window
 */
export function smoothed(values, window) {
  const keep = 1 - 1 / Math.max(1, window);
  let total = 0;
  let weight = 0;
  return values.map((value) => {
    if (Number.isFinite(value)) {
      total = keep * total + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
    }
    return weight ? total / weight : NaN;
  });
}

/** Whether this is a loss on validation pairs, of the trained weights or their EMA. @param {string} name */
export function isHeldOut(name) {
  return /^(ema_)?validation_loss/.test(name);
}

/** Whether validation measures this value. @param {string} name */
export function isMeasured(name) {
  return isHeldOut(name) || name.startsWith("drift");
}

/** @param {number} count Number of values to smooth. */
export function smoothingWindow(count) {
  return Math.min(50, Math.max(5, count / 20));
}

/**
 * Lowest and highest value to show. The top 1 % of `values` may be cut off, so that outliers do not flatten the curve;
 * all of `needed` is visible.
 * @param {number[]} values
 * @param {number[]} needed
 * @returns {[number, number]}
 */
export function range(values, needed) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  const shown = needed.filter(Number.isFinite);
  if (!sorted.length && !shown.length) return [0, 1];
  const top = sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * 0.99))];
  const low = Math.min(...shown, sorted[0] ?? Infinity);
  const high = Math.max(...shown, top ?? -Infinity);
  const span = high - low > 1e-9 * Math.abs(high) ? high - low : 0; // a smaller span is rounding noise
  const margin = span * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
}

/**
 * Round values inside a range, about `count` of them.
 * @param {number} low
 * @param {number} high
 * @param {number} count
 */
export function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  if (!(rough > 1e-12 * Math.abs(high))) return [low]; // below floating point precision
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough) ?? rough;
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) {
    found.push(Number((index * step).toPrecision(12)));
  }
  return found;
}

/**
 * The index of the value nearest to `wanted` in an ascending list.
 * @param {number[]} values
 * @param {number} wanted
 */
export function nearest(values, wanted) {
  let low = 0;
  let high = values.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wanted - values[low - 1] < values[low] - wanted ? low - 1 : low;
}
