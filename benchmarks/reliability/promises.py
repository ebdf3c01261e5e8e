"""What the documentation promises, what holds it, and where its latest figure is: the data of docs/reliability.md.

A new promise of README.md, SECURITY.md or docs/ gets a line here. Whether a test runs at every commit or at night is
read from its markers, and the figure from benchmarks/results: neither is written here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

ENGINE = ("src/vecmill/models/*", "src/vecmill/engine/*")
SCHEDULING = ("src/vecmill/scheduler/*", "src/vecmill/inference/*")
HTTP = ("src/vecmill/http/*", "src/vecmill/serve/*", "src/vecmill/app.py")
JOBS = ("src/vecmill/jobs/*", "src/vecmill/batches/*")
STORED = ("src/vecmill/storage/*", "src/vecmill/cache/*")
SERVER = (*ENGINE, *SCHEDULING, *HTTP, *JOBS, *STORED)
DEPLOYMENT = ("deploy.py", "deployment/*")

# How each figure is measured again; that of the tests of the night: RECORD.
COMMANDS: Mapping[str, str] = {
    "answer_memory": "python -m benchmarks.serving.answer_memory",
    "cache": "python -m benchmarks.serving.cache --rounds 3 --miss-rounds 10",
    "hostile": "python -m benchmarks.serving.hostile",
    "isolation": "python -m benchmarks.serving.isolation",
    "overhead": "python -m benchmarks.serving.overhead --rounds 3",
    "proxy_overhead": "python -m benchmarks.cluster.proxy_overhead",
    "quality": "python -m benchmarks.quality",
    "redis_cost": "python -m benchmarks.cluster.redis_cost",
    "replicas": "python -m benchmarks.cluster.replicas",
    "scaling": "python -m benchmarks.serving.scaling",
    "soak": "python -m benchmarks.soak",
    "throughput": "python -m benchmarks.serving.throughput",
}
RECORD = "python -m benchmarks.reliability --record"


@dataclass(frozen=True)
class Figure:
    """A measured figure."""

    benchmark: str
    """Of the files in benchmarks/results; the newest that has every value counts."""
    text: str
    """`{a/b/c}` is the value at that path in the file. One that misses the target beside it is shown with it."""


@dataclass(frozen=True)
class Promise:
    """One promise."""

    text: str
    """A sentence."""
    tests: tuple[str, ...]
    """Files, folders, or `file::test`. Without a `figure`, the last recorded run of those of the night is it."""
    code: tuple[str, ...]
    """Patterns of the files whose change makes the figure old; `*` also stands for folders."""
    figure: Figure | None = None


SURVIVAL = "tests/faults/test_survival.py"

GROUPS: Mapping[str, tuple[Promise, ...]] = {
    "Answers are right": (
        Promise(
            "Vectors and scores equal those of sentence-transformers within [stated tolerances](models.md#tolerances).",
            ("tests/models/test_tolerances.py", "tests/models/families", "benchmarks/tests/test_quality.py"),
            ENGINE,
            Figure(
                "quality",
                "nDCG@10 {server/ndcg}, sentence-transformers {reference/ndcg}; lowest cosine {min_cosine}, bfloat16",
            ),
        ),
        Promise(
            "What else is in a batch changes a vector or score by no more than that.",
            ("tests/models/test_packing.py",),
            ENGINE,
            Figure(
                "soak",
                "{checks/answers/wrong} of {checks/answers/vectors} vectors and {checks/answers/scores} scores "
                "differ; lowest cosine {checks/answers/lowest_cosine}",
            ),
        ),
        Promise(
            "With `DETERMINISTIC=true` it changes no bit of them, through every dialect and from the cache.",
            ("tests/engine/test_determinism.py",),
            (*ENGINE, *SCHEDULING),
        ),
        Promise(
            "A vector from the cache is the computed one within the same tolerances.",
            ("tests/cache/test_vector_format.py", "tests/models/test_tolerances.py", "tests/http/test_cache.py"),
            STORED,
        ),
        Promise(
            "Every key of a checkpoint is honoured, or the start refuses it by name.",
            ("tests/checkpoints/test_any_key.py", "tests/checkpoints/test_config.py"),
            ("src/vecmill/models/*",),
        ),
        Promise(
            "A text whose vector is not finite is refused by name; others in its batch are answered.",
            ("tests/http/test_non_finite.py",),
            (*ENGINE, *SCHEDULING),
        ),
        Promise(
            "A model that was unloaded, or slept, comes back the same to the bit.",
            ("tests/engine/test_live_models.py", "tests/engine/test_sleeping_models.py"),
            ENGINE,
        ),
    ),
    "Every request is answered": (
        Promise(
            "Load is held: no 5xx, no hang, no broken connection.",
            ("benchmarks/tests/test_soak.py",),
            SERVER,
            Figure(
                "soak",
                "{settings/minutes} min, {settings/connections} connections, {requests_per_second} answers/s: "
                "{checks/5xx/count} 5xx, {checks/hang/count} hangs, {checks/broken/count} broken",
            ),
        ),
        Promise(
            "`/health` answers under load, p99 below 50 ms.",
            ("benchmarks/tests/test_soak.py",),
            (*HTTP, *SCHEDULING),
            Figure("soak", "p99 {checks/health_p99_ms/value} ms, longest {health_ms/max} ms"),
        ),
        Promise(
            "Memory, descriptors and threads stay flat under load.",
            ("benchmarks/tests/test_soak.py",),
            SERVER,
            Figure(
                "soak",
                "memory {checks/memory_mb/per_hour} MB/h ({checks/memory_mb/low} to {checks/memory_mb/high}) over "
                "{settings/minutes} min; descriptors {checks/descriptors/per_hour}/h",
            ),
        ),
        Promise(
            "Nothing a client sends gives a 5xx or holds the others up; the error names field and cure.",
            (
                "tests/hostile",
                "tests/http/test_bad_input.py",
                "tests/http/test_any_text.py",
                "tests/clients/test_fuzz.py",
            ),
            HTTP,
            Figure(
                "hostile",
                "{all/within_targets} of {all/attacks} attacks, of up to 33 MB, within bounds; the event loop was held "
                "at most {all/stall_ms/longest} ms",
            ),
        ),
        Promise(
            "A request is bounded before it is worked on: bytes, values, texts, tokens, time.",
            (
                "tests/hostile/test_bodies.py",
                "tests/hostile/test_encodings.py",
                "tests/hostile/test_heads.py",
                "tests/hostile/test_validation.py",
                "tests/hostile/test_long_texts.py",
                "tests/hostile/test_slow_bodies.py",
            ),
            (*HTTP, *SCHEDULING),
        ),
        Promise(
            "An answer takes at most three times its vectors in memory, however slowly it is read.",
            ("benchmarks/tests/test_serving.py",),
            HTTP,
            Figure(
                "answer_memory",
                "{encodings/float/results/median} times for an answer of {encodings/float/answer_bytes} bytes",
            ),
        ),
        Promise(
            "Beyond the limits clients get a 429 or 503 that makes them try again.",
            ("tests/http/test_overload.py", "tests/hostile/test_overload.py", "tests/inference/test_admission.py"),
            (*HTTP, *SCHEDULING),
        ),
        Promise(
            "Readers of foreign bytes keep their promises for bytes nobody would write.",
            ("tests/fuzz/test_targets.py", "tests/hostile/test_wire_grammar.py"),
            (*HTTP, "src/vecmill/models/*"),
        ),
    ),
    "Searches first, turns for all": (
        Promise(
            "A search waits for no more of an index than the running forward pass, and is never refused for it.",
            (
                "tests/http/test_lanes.py",
                "tests/scheduler",
                "tests/hostile/test_overload.py::test_a_search_is_never_refused_for_bulk",
            ),
            (*SCHEDULING, *ENGINE),
            Figure(
                "isolation",
                "p95 {sides/vecmill/person_beside_bulk_ms/p95/median} ms beside bulk, "
                "{sides/vecmill/person_alone_ms/p95/median} ms alone",
            ),
        ),
        Promise(
            "Clients, keys and jobs take turns by tokens, whatever they call themselves.",
            ("tests/hostile/test_turns.py", "tests/scheduler/test_policy.py", "tests/hostile/test_key_limits.py"),
            SCHEDULING,
        ),
        Promise(
            "A cut of a batch takes as long with 100,000 texts waiting as with 100.",
            ("benchmarks/tests/test_serving.py",),
            ("src/vecmill/scheduler/*",),
            Figure(
                "scaling",
                "{queue/1/us_per_cut/100/median} µs with 100, {queue/1/us_per_cut/100000/median} with 100,000",
            ),
        ),
    ),
    "Faults are survived": (
        Promise(
            "Forward passes that raise fail their own requests alone.",
            (f"{SURVIVAL}::test_passes_that_raise_fail_alone",),
            (*ENGINE, *SCHEDULING),
        ),
        Promise(
            "A device that fails ends the process visibly: all who wait are answered, the supervisor starts it again.",
            (f"{SURVIVAL}::test_a_device_thread_that_ends_ends_the_process", "tests/serve/test_device_failure.py"),
            (*ENGINE, "src/vecmill/serve/*"),
        ),
        Promise(
            "Any other thread that ends is replaced; a tokenizer that panics fails its request alone.",
            (f"{SURVIVAL}::test_threads_that_end_are_replaced", f"{SURVIVAL}::test_a_panic_fails_its_request_alone"),
            SERVER,
        ),
        Promise(
            "Clients that vanish, stall or send half leave nothing behind.",
            (f"{SURVIVAL}::test_clients_that_vanish_leave_nothing_behind", "tests/hostile/test_slow_bodies.py"),
            (*HTTP, *SCHEDULING),
        ),
        Promise(
            "SIGTERM: what runs is answered, what comes is refused, batches are written down.",
            ("tests/serve/test_stopping.py", "tests/hostile/test_faults_of_stopping.py"),
            (*HTTP, *JOBS),
        ),
        Promise(
            "SIGSTOP and SIGCONT under load: the process goes on, and jobs outlive it.",
            (f"{SURVIVAL}::test_a_stopped_process_goes_on",),
            (*HTTP, *JOBS),
        ),
        Promise(
            "A full or broken disk, or one that hangs, stops what needs it and nothing else.",
            (
                "tests/faults/test_disk.py",
                "tests/faults/test_hung_disk.py",
                "tests/faults/test_databases.py",
                "tests/hostile/test_faults_on_disk.py",
            ),
            (*STORED, *JOBS),
        ),
        Promise(
            "A state folder that is removed is made again.",
            (f"{SURVIVAL}::test_a_state_folder_that_is_removed_is_made_again", "tests/storage/test_state_folder.py"),
            STORED,
        ),
        Promise(
            "Without Redis jobs are 503 and embedding goes on; with it again all goes on by itself.",
            ("tests/http/test_redis_faults.py", "tests/jobs/test_shared.py", "tests/storage/test_redis.py"),
            (*STORED, *JOBS),
        ),
        Promise(
            "Jumps of the clock move neither jobs nor batches nor vectors.",
            ("tests/faults/test_clock.py",),
            (*STORED, *JOBS),
        ),
        Promise(
            "Memory that ends fails what needs it; batches are halved until they fit.",
            (f"{SURVIVAL}::test_memory_that_ends_fails_what_needs_it", "tests/http/test_out_of_memory.py"),
            (*ENGINE, *SCHEDULING),
        ),
        Promise(
            "Connections leave descriptors to everything else.",
            (f"{SURVIVAL}::test_connections_leave_descriptors_to_everything_else",),
            HTTP,
        ),
        Promise(
            "Behind Ray Serve an upgrade fails no request, and without its head the other nodes answer.",
            ("tests/cluster/test_nodes.py",),
            ("src/vecmill/cluster/*",),
        ),
        Promise(
            "A generation server that dies or hangs harms only what is passed to it.",
            ("tests/http/test_generation.py",),
            ("src/vecmill/http/*",),
        ),
    ),
    "Nothing is lost": (
        Promise(
            "Jobs survive SIGKILL at any moment: none is lost, none is stuck.",
            ("tests/faults/test_kill_job.py", "tests/http/test_jobs_durable.py", "tests/faults/test_replicas.py"),
            ("src/vecmill/jobs/*", "src/vecmill/storage/*"),
        ),
        Promise(
            "Batches survive SIGKILL at any moment: each line is in the output or the errors, once.",
            ("tests/faults/test_kill_batch.py", "tests/batches"),
            ("src/vecmill/batches/*", "src/vecmill/storage/*"),
        ),
        Promise(
            "Vectors survive SIGKILL in the middle of a write or of an upgrade: each is right or computed again.",
            ("tests/faults/test_kill_cache.py",),
            STORED,
        ),
        Promise(
            "State of every released format is opened; newer state stops the start and is not touched.",
            ("tests/upgrades/test_upgrades.py",),
            (*STORED, *JOBS),
        ),
        Promise(
            "Two servers never take one state folder, and those that may share it run each batch once.",
            (
                "tests/faults/test_two_servers.py",
                "tests/batches/test_shared_folder.py",
                "tests/storage/test_state_folder.py",
            ),
            (*STORED, *JOBS),
        ),
    ),
    "It is safe to run": (
        Promise(
            "No code of a model is run, and no pickle opened.",
            ("tests/checkpoints/test_no_code.py",),
            ("src/vecmill/models/*",),
        ),
        Promise(
            "Without a key nothing is done where keys are set; web pages of other origins are refused.",
            ("tests/http/test_access.py", "tests/hostile/test_cors.py"),
            HTTP,
        ),
        Promise(
            "A key sees its own jobs, files and batches, and is told nothing of others' texts.",
            ("tests/hostile/test_ownership.py",),
            (*HTTP, *JOBS),
        ),
        Promise(
            "No text and no key is in the log.",
            ("tests/hostile/test_logs.py", "tests/http/test_request_log.py", "tests/serve/test_reload.py"),
            (*HTTP, "src/vecmill/telemetry/*"),
        ),
        Promise(
            "`deploy.py` as root follows no links or files of others, and writes what `--dry-run` said, byte for byte.",
            ("tests/deployment/test_hostile_root.py", "tests/deployment/test_dry_run.py"),
            DEPLOYMENT,
        ),
        Promise(
            "Every file that is installed has a locked hash; the same files give the same wheel.",
            ("tests/packaging/test_locks.py", "tests/packaging/test_packaging.py"),
            ("src/vecmill/__init__.py",),
        ),
    ),
    "It takes little": (
        Promise(
            "The bundled model answers within seconds, and each model as soon as it is loaded.",
            ("tests/http/test_start.py",),
            SERVER,
        ),
        Promise(
            "An unloaded model gives its memory back, no request is lost, no model in use is taken.",
            (
                "tests/engine/test_live_models.py::test_memory_comes_back_and_searches_go_on",
                "tests/http/test_model_life.py",
                "tests/inference/test_residency.py",
            ),
            (*ENGINE, *SCHEDULING),
        ),
        Promise(
            "Throughput over HTTP, on a CPU.",
            ("benchmarks/tests/test_serving.py",),
            (*ENGINE, *SCHEDULING),
            Figure(
                "throughput", "{sides/vecmill/texts_per_s/median} texts/s, {sides/vecmill/tokens_per_s/median} tokens/s"
            ),
        ),
        Promise(
            "HTTP, tokenizing and encoding take 64 texts at most 5 ms.",
            ("benchmarks/tests/test_serving.py",),
            (*HTTP, *SCHEDULING),
            Figure("overhead", "{cases/64 x 384 base64/ms/outside/median} ms in base64"),
        ),
        Promise(
            "Known texts are answered from the cache.",
            ("tests/cache", "tests/http/test_cache.py"),
            (*STORED, *HTTP),
            Figure(
                "cache",
                "{hits/384/texts_per_second/median} texts/s; a look-up among {store/entries} takes "
                "{store/look_up_ms/warm/p50} ms",
            ),
        ),
        Promise(
            "Replicas' rates add up.",
            ("tests/core/test_routing.py", "benchmarks/tests/test_cluster.py"),
            ("src/vecmill/core/routing.py", *SCHEDULING),
            Figure(
                "replicas",
                "simulated passes: {simulated/routings/policy/1/texts_per_s/median}, "
                "{simulated/routings/policy/2/texts_per_s/median}, {simulated/routings/policy/3/texts_per_s/median} "
                "texts/s with 1, 2, 3",
            ),
        ),
        Promise(
            "A proxy loses no request while one of two servers is killed or drained.",
            ("tests/tools/proxy_config",),
            ("src/vecmill/tools/proxy_config/*",),
            Figure("proxy_overhead", "HAProxy adds {cases/10000 bytes, 1 connections/added_ms/haproxy/p50/median} ms"),
        ),
        Promise(
            "Redis costs little.",
            ("benchmarks/tests/test_redis_cost.py",),
            STORED,
            Figure("redis_cost", "a hit {http/hit/added_ms/p50} ms, a report of a job {http/progress/added_ms/p50} ms"),
        ),
    ),
}
