// What the server answers, for the type checker alone: no browser reads this file. Unknown is null, never 0.

import type UPlot from "uplot";

declare global {
  /** vendor/uPlot.iife.min.js, a classic script. */
  const uPlot: typeof UPlot;
}

export type Maybe<T> = T | null | undefined;

/** GET /dashboard/snapshot, and each event of GET /dashboard/events. */
export interface Snapshot {
  at: number;
  version: string;
  uptime_seconds: Maybe<number>;
  replica?: Maybe<string>;
  status: string;
  status_text?: Maybe<string>;
  /** Of the start that is done. */
  percent: number;
  ready: boolean;
  is_admin: boolean;
  keys_in_use: boolean;
  warnings: Warning[];
  replicas?: Maybe<Replicas>;
  now: Maybe<Now>;
  who: Maybe<User[]>;
  refusals: Maybe<Refusal[]>;
  jobs: Maybe<Page<Job>>;
  batches: Maybe<Page<Batch>>;
  models: Maybe<Model[]>;
  machine: Maybe<Machine>;
}

export interface Warning {
  name: string;
  text: string;
}

/** The servers that share Redis; who they are is for administrators. */
export interface Replicas {
  count: number;
  /** Records in Redis that are none. */
  unreadable: number;
  problem: Maybe<string>;
  totals: Maybe<{ ready: number; texts_per_second: Maybe<number>; requests_per_second: Maybe<number>; queue: Queue }>;
  items: Maybe<Replica[]>;
}

/** What a server says of itself, of another version perhaps. */
export interface Replica {
  replica: string;
  id: string;
  this: boolean;
  url: Maybe<string>;
  version: Maybe<string>;
  status: Maybe<string>;
  gone_since: Maybe<number>;
  uptime_seconds: Maybe<number>;
  texts_per_second: Maybe<number>;
  searches_p95_ms: Maybe<number>;
  queue: Queue;
  memory: { ours_bytes: Maybe<number>; total_bytes: Maybe<number> };
  models: { id: Maybe<string> }[];
}

export interface Latency {
  p50: Maybe<number>;
  p95: Maybe<number>;
}

export interface Queue {
  texts: Maybe<number>;
  tokens: Maybe<number>;
}

/** Rates are over the last minute. */
export interface Now {
  texts_per_second: Maybe<number>;
  tokens_per_second: Maybe<number>;
  requests_per_second: Maybe<number>;
  searches_per_second: Maybe<number>;
  latency_ms: Maybe<{ interactive: Latency; bulk: Latency }>;
  queue: Maybe<{ interactive: Queue; bulk: Queue }>;
  cache: Maybe<Cache>;
  batch_fill: Maybe<{ tokens_per_pass: Maybe<number>; knee_tokens: Maybe<number>; ratio: Maybe<number> }>;
  device_busy_ratio: Maybe<number>;
  errors: Maybe<number>;
  refused: Maybe<number>;
}

export interface Cache {
  hit_ratio: Maybe<number>;
  tokens_saved: Maybe<number>;
  entries: Maybe<number>;
  bytes: Maybe<number>;
  max_bytes: Maybe<number>;
}

export interface User {
  key: Maybe<string>;
  client: Maybe<string>;
  job: Maybe<string>;
  job_name: Maybe<string>;
  texts_per_second: Maybe<number>;
  tokens_per_second: Maybe<number>;
  requests: Maybe<number>;
  last_seen: Maybe<number>;
}

export interface Refusal {
  at: number;
  request_id: string;
  status: number;
  error: string;
  reason: Maybe<string>;
  path: Maybe<string>;
  client: Maybe<string>;
  key: Maybe<string>;
}

export interface Page<T> {
  counts: Maybe<Record<string, number>>;
  total: number;
  page: number;
  pages: number;
  items: T[];
}

export interface Job {
  id: string;
  project: string;
  instance_id: string;
  status: string;
  current: number;
  total_chunks: number;
  created_at: number;
  started_at?: Maybe<number>;
  completed_at?: Maybe<number>;
  duration_seconds?: Maybe<number>;
  elapsed_seconds?: Maybe<number>;
  percent?: Maybe<number>;
  error?: Maybe<string>;
  position?: Maybe<number>;
  chunks_ahead?: Maybe<number>;
  estimated_wait?: Maybe<number>;
  texts_per_second?: Maybe<number>;
  eta_seconds?: Maybe<number>;
  silent_seconds?: Maybe<number>;
  given_up_in_seconds?: Maybe<number>;
  waiting_seconds?: Maybe<number>;
  key?: Maybe<string>;
  replica?: Maybe<string>;
}

export interface Batch {
  id: string;
  endpoint: string;
  model: Maybe<string>;
  status: string;
  errors: Maybe<{ data: { line?: Maybe<number>; message: string }[] }>;
  input_file_id: string;
  output_file_id: Maybe<string>;
  error_file_id: Maybe<string>;
  created_at: number;
  completed_at?: Maybe<number>;
  expires_at?: Maybe<number>;
  request_counts: { total: number; completed: number; failed: number };
  usage?: Maybe<{ total_tokens: number; input_tokens_details?: { cached_tokens: number } }>;
  metadata: Maybe<Record<string, string>>;
  lines_per_second?: Maybe<number>;
  eta_seconds?: Maybe<number>;
  input_bytes?: Maybe<number>;
  name?: Maybe<string>;
  key?: Maybe<string>;
  output_bytes?: Maybe<number>;
}

export interface Model {
  id: string;
  aliases?: string[];
  task: Maybe<"embed" | "rerank">;
  state: string;
  progress?: Maybe<number>;
  message?: Maybe<string>;
  dimensions?: Maybe<number | number[] | { min: number; max: number }>;
  dtype?: Maybe<string>;
  dtype_reason?: Maybe<string>;
  prompts?: Maybe<Record<string, string>>;
  default_prompt?: Maybe<string>;
  max_tokens?: Maybe<number>;
  revision?: Maybe<string>;
  license?: Maybe<string>;
  memory_bytes?: Maybe<number>;
  sleeping_bytes?: Maybe<number>;
  last_used?: Maybe<number>;
  loaded_at?: Maybe<number>;
  pinned?: Maybe<boolean>;
  budget?: Maybe<{ tokens: number; rows: number }>;
  fit?: Maybe<{ a_ms: number; b_us_per_token: number; changed_at: Maybe<number> }>;
}

/** A model of GET /v1/models. */
export interface ListedModel {
  id: string;
  task?: "embed" | "rerank";
  dimensions?: Maybe<number>;
  supported_dimensions?: Maybe<number[] | { min: number; max: number }>;
  prompts?: Maybe<Record<string, string>>;
  default_prompt_name?: Maybe<string>;
}

export interface Share {
  total_bytes: Maybe<number>;
  ours_bytes: Maybe<number>;
  others_bytes: Maybe<number>;
  free_bytes: Maybe<number>;
}

export interface Machine {
  memory: Maybe<
    Share & { unified: boolean; page_cache_bytes: Maybe<number>; floor_bytes: Maybe<number>; gpu: Maybe<Share> }
  >;
  gpu: Maybe<{
    name: Maybe<string>;
    in_use?: Maybe<boolean>;
    stale?: Maybe<boolean>;
    utilization_ratio: Maybe<number>;
    sm_clock_mhz: Maybe<number>;
    clock_verdict: Maybe<string>;
    clock_text: Maybe<string>;
    power_watts: Maybe<number>;
    temperature_c: Maybe<number>;
  }>;
  cpu: Maybe<{ cores: Maybe<number>; process_ratio: Maybe<number> }>;
}

/** GET /dashboard/history. */
export interface History {
  step_seconds: number;
  at: number[];
  series: Record<string, Maybe<number>[]>;
}

/** GET /dashboard/doctor. */
export interface Doctor {
  running: boolean;
  started_at: Maybe<number>;
  ended_at: Maybe<number>;
  error?: Maybe<string>;
  result?: Maybe<{
    ok: boolean;
    checks: { name: string; status: "ok" | "warn" | "fail"; seen: string; cure: Maybe<string>; seconds: number }[];
  }>;
}

/** What the list of jobs and that of batches show of all there are. */
export interface Query {
  jobs_q: string;
  jobs_state: string;
  jobs_page: number;
  batches_page: number;
}
