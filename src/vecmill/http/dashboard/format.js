// Numbers and times as text. Knows units and rounding; does not know what is measured.

export const UNKNOWN = "–"; // not available is not zero

export const known = (value) => typeof value === "number" && Number.isFinite(value);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const count = (value) => (known(value) ? whole.format(value) : UNKNOWN);
export const rate = (value) => (known(value) ? (value < 100 ? tenths : whole).format(value) : UNKNOWN);
// Rounded down: unfinished work must not read as 100 %.
export const percent = (value) => (known(value) ? `${whole.format(Math.floor(value))} %` : UNKNOWN);
export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

export function milliseconds(value) {
  if (!known(value)) return UNKNOWN;
  return value < 1000 ? `${rate(value)} ms` : `${tenths.format(value / 1000)} s`;
}

export function memory(mebibytes) {
  if (!known(mebibytes)) return UNKNOWN;
  return mebibytes < 1024 ? `${count(mebibytes)} MiB` : `${tenths.format(mebibytes / 1024)} GiB`;
}

export function duration(seconds) {
  if (!known(seconds)) return UNKNOWN;
  if (seconds < 10) return `${tenths.format(seconds)} s`;
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export const clock = (date) => date.toLocaleTimeString();
