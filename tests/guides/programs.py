"""Other people's programs that the guides call: their subcommands and flags, as far as they are used.

A flag that takes a value ends in `=`; each program's own documentation is the source that is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Program:
    """Flags, and the subcommands where there are any."""

    flags: frozenset[str] = frozenset()
    subcommands: Mapping[str, Program] = field(default_factory=dict)
    arguments: str | None = None
    """What words may stand in a subcommand's place; None: none where there are subcommands, else any."""
    source: str = ""

    def takes(self, word: str) -> bool:
        """Whether a word that is neither flag nor subcommand may stand here."""
        if self.arguments is None:
            return not self.subcommands
        return re.fullmatch(self.arguments, word) is not None


def program(flags: str = "", source: str = "", arguments: str | None = None, **subcommands: Program) -> Program:
    """Flags as one string, subcommands by name (`_` for `-`)."""
    named = {name.replace("_", "-"): subcommand for name, subcommand in subcommands.items()}
    return Program(frozenset(flags.split()), named, arguments, source)


MAN = "its manual page on Ubuntu 24.04"
TAILSCALE = "https://tailscale.com/kb/1080/cli and /kb/1242/tailscale-serve"
DOCKER = "https://docs.docker.com/reference/cli/docker/"
RAY = "https://docs.ray.io/en/latest/cluster/cli.html and /serve/api/"
KUBECTL = "https://kubernetes.io/docs/reference/kubectl/generated/"

PROGRAMS: Mapping[str, Program] = {
    "aiperf": program(
        source="aiperf profile --help, of AIPerf 0.13.0",
        profile=program(
            "--url= --model= --endpoint-type= --tokenizer= --concurrency= --request-count= --warmup-request-count= -H= "
            "--num-dataset-entries= --prompt-batch-size= --synthetic-input-tokens-mean= --ui= --artifact-dir= "
            "--rankings-passages-mean= --rankings-passages-prompt-token-mean= --rankings-query-prompt-token-mean="
        ),
    ),
    "ray": program(
        source=RAY,
        start=program("--head --address= --port= --num-gpus= --redis-password="),
        stop=program("--force"),
        status=program(),
    ),
    "serve": program(
        source=RAY,
        run=program("--app-dir= --blocking --non-blocking"),
        build=program("-o= --output-path="),
        deploy=program(),
        status=program(),
    ),
    "apt": program(source=MAN, install=program("-y")),
    "cat": program(source=MAN),
    "sha256sum": program("--check --ignore-missing", source=MAN),
    "ssh-keygen": program("-Y= -n= -f= -I= -s=", source=MAN),
    "cd": program(source="bash"),
    "cp": program("-r", source=MAN),
    "dmesg": program(source=MAN),
    "docker": program(
        source=DOCKER,
        build=program("-t= --tag= -f= --file= --build-arg= --platform= --load --push"),
        compose=program(
            "-f= --file= --profile= --env-file= --project-name= -p=",
            up=program("-d --detach --build --wait --wait-timeout= --force-recreate"),
            down=program("-v --volumes"),
            build=program("--build-arg= --pull"),
            pull=program(),
            logs=program("-f --follow --tail= -n="),
            ps=program("-a"),
            exec=program("-T -it"),
            run=program("--rm -T"),
            restart=program(),
            kill=program("-s= --signal="),
            config=program("-q --quiet"),
        ),
        exec=program("-it -i -t"),
        image=program(ls=program(), prune=program()),
        info=program(),
        inspect=program("-f= --format="),
        logs=program("-f --follow --tail= -n="),
        ps=program("-a"),
        pull=program("--platform="),
        restart=program(),
        rm=program("-f"),
        run=program(
            "-d --detach --rm -it -p= --publish= -v= --volume= -e= --env= --env-file= --gpus= --name= --read-only "
            "--init --tmpfs= --memory "
            "--restart= --cap-drop= --security-opt= --stop-timeout= --network= --mount= --user="
        ),
        stop=program("-t="),
        volume=program(ls=program(), inspect=program(), rm=program()),
    ),
    "echo": program(source="bash"),
    "free": program("-h", source=MAN),
    "haproxy": program("-c -f=", source=MAN),
    "git": program(source=MAN, clone=program(), pull=program(), checkout=program(), log=program("--oneline -1 -5")),
    "kubectl": program(
        "-n= --namespace=",
        source=KUBECTL,
        apply=program("-k= --kustomize= -f= --filename= -n= --namespace= --server-side"),
        create=program(
            "-n= --namespace=",
            namespace=program("-n="),
            secret=program(generic=program("-n= --namespace= --from-literal= --from-file= --from-env-file=")),
        ),
        delete=program("-k= -f= -n= --namespace="),
        describe=program("-n= --namespace="),
        diff=program("-k= -f="),
        exec=program("-n= --namespace= -it -i -t"),
        get=program("-n= --namespace= -o= --output= -w -A --watch -l="),
        kustomize=program(),
        label=program(),
        logs=program("-n= --namespace= -f --follow --tail= --previous -l="),
        port_forward=program("-n= --namespace="),
        rollout=program(
            restart=program("-n= --namespace="), status=program("-n= --namespace= --timeout="), undo=program("-n=")
        ),
        scale=program("-n= --namespace= --replicas="),
        top=program("-n= --namespace="),
        wait=program("-n= --namespace= --for= --timeout="),
    ),
    "mkdir": program("-p", source=MAN),
    "mount": program("-t= -o=", source=MAN),
    "nginx": program("-t -s= -c=", source=MAN),
    "netplan": program(source=MAN, apply=program()),
    "ping": program("-c=", source=MAN),
    "nvidia-smi": program(
        "-q -L -l= -d= -rgc --query-gpu= --query-compute-apps= --format=",
        source="https://docs.nvidia.com/deploy/nvidia-smi/",
    ),
    "qmd": program(
        source="src/cli of the QMD that has `remote:`",
        remote=program(test=program()),
        embed=program("-f"),
        query=program(),
    ),
    "rm": program("-r -f", source=MAN),
    "ss": program("-l -t -n -p", source=MAN),
    "ssh": program("-N -L=", source=MAN),
    "sudoedit": program(source=MAN),
    "sync": program(source=MAN),
    "tailscale": program(
        source=TAILSCALE,
        serve=program(
            "--service= --https= --bg --yes",
            arguments=r"([\w.]+:)?\d+|off",
            advertise=program(),
            clear=program(),
            drain=program(),
            reset=program(),
            status=program("--json"),
        ),
        set=program("--operator="),
        status=program("--json"),
        up=program("--advertise-tags="),
        update=program(),
    ),
    "tar": program("-C= -c -x -z -f= --exclude=", source=MAN),
    "tee": program("-a", source=MAN),
    "zcat": program(source=MAN),
    "uv": program(
        source="https://docs.astral.sh/uv/reference/cli/",
        run=program("--with="),
        tool=program(install=program("--excludes= --torch-backend= --python="), upgrade=program()),
    ),
}


def problems(name: str, words: Sequence[str], known: Program | None = None) -> Iterator[str]:
    """What is wrong with the words after a program's name."""
    known = known or PROGRAMS[name]
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return
        if word.startswith("-") and word != "-":
            yield from _flag(name, word, known, rest)
        elif word in known.subcommands:
            yield from problems(f"{name} {word}", rest, known.subcommands[word])
            return
        elif not known.takes(word):
            yield f"{name} has no subcommand {word!r} that is known here"
            return


def _flag(name: str, word: str, known: Program, rest: list[str]) -> Iterator[str]:
    """Check one flag; a value that follows is taken from `rest`."""
    flag, has_value, _ = word.partition("=")
    if f"{flag}=" in known.flags:
        if not has_value and rest:
            rest.pop(0)
    elif flag not in known.flags:
        yield from _cluster(name, word, known, rest)


def _cluster(name: str, word: str, known: Program, rest: list[str]) -> Iterator[str]:
    """`-czf FILE`: several flags of one letter."""
    letters = [f"-{letter}" for letter in word[1:]]
    if not re.fullmatch(r"-[A-Za-z]{2,}", word) or not all(
        character in known.flags or f"{character}=" in known.flags for character in letters
    ):
        yield f"{name} has no flag {word!r} that is known here"
    elif f"{letters[-1]}=" in known.flags and rest:
        rest.pop(0)
