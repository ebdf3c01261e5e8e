// Numbers, sizes and times as text. Knows units and rounding; does not know what is measured.

/** @import { Maybe } from "./types" */

export const UNKNOWN = "–"; // not available is not zero

/** @param {unknown} value @returns {value is number} */
export function known(value) {
  return typeof value === "number" && Number.isFinite(value);
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const moments = new Intl.DateTimeFormat("en-GB", {
  day: "numeric",
  month: "short",
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
});
const years = new Intl.DateTimeFormat("en-GB", { dateStyle: "full", timeStyle: "long" });

/** @param {unknown} value */
export const count = (value) => (known(value) ? whole.format(value) : UNKNOWN);

/** 1,234 as it is, 84.2K and 1.3M short. @param {unknown} value */
export const compact = (value) => (known(value) ? (value < 10_000 ? whole : short).format(value) : UNKNOWN);

/** What is above 0 is not shown as 0. @param {unknown} value */
export function rate(value) {
  if (!known(value)) return UNKNOWN;
  if (value > 0 && value < 0.05) return "< 0.1";
  return (value < 100 ? tenths : whole).format(value);
}

/** A number with its unit; unknown has none. @param {string} text @param {string} unit */
export const unit = (text, unit) => (text === UNKNOWN ? text : `${text} ${unit}`);

/** Rounded down: unfinished work must not read as 100 %. @param {unknown} value */
export const percent = (value) => (known(value) ? `${whole.format(Math.floor(value + 1e-9))} %` : UNKNOWN);

/** @param {unknown} ratio */
export const share = (ratio) => percent(known(ratio) ? 100 * ratio : null);

/** @param {unknown} value @param {string} noun */
export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

/** The same in short. @param {unknown} value @param {string} noun */
export const compactly = (value, noun) => unit(compact(value), value === 1 ? noun : `${noun}s`);

/** @param {unknown} value */
export function milliseconds(value) {
  if (!known(value)) return UNKNOWN;
  return value < 1000 ? `${rate(value)} ms` : `${tenths.format(value / 1000)} s`;
}

const SIZES = ["B", "KiB", "MiB", "GiB", "TiB"];

/** @param {unknown} value */
export function bytes(value) {
  if (!known(value)) return UNKNOWN;
  const step = value < 1 ? 0 : Math.min(SIZES.length - 1, Math.floor(Math.log2(value) / 10));
  const scaled = value / 1024 ** step;
  return `${(scaled < 100 && step > 1 ? tenths : whole).format(scaled)} ${SIZES[step]}`;
}

/** @param {unknown} seconds */
export function duration(seconds) {
  if (!known(seconds)) return UNKNOWN;
  const s = Math.round(Math.max(0, seconds));
  if (s < 60) return `${s} s`;
  if (s < 600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** In the largest unit alone: how old something is. @param {number} seconds */
export function age(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  return s < 86400 ? `${Math.floor(s / 3600)} h` : `${Math.floor(s / 86400)} d`;
}

/** Day and time, as `26 Nov, 15:04:05`. @param {unknown} seconds since 1970 */
export const moment = (seconds) => (known(seconds) ? moments.format(new Date(seconds * 1000)) : UNKNOWN);

/** The same with year and zone. @param {number} seconds since 1970 */
export const fullMoment = (seconds) => years.format(new Date(seconds * 1000));

/** A status of the server's as words. @param {string} status */
export const words = (status) => status.replaceAll("_", " ");

/** @param {Maybe<string | false>[]} parts */
export const join = (parts) => parts.filter(Boolean).join(" · ");
