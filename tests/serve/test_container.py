"""The Dockerfile and the compose file say what the command line understands, and let little in."""

import json
import re
from pathlib import Path

import yaml
from visistage.cli.main import main

ROOT = Path(__file__).parents[2]


def check_command(words):
    command = main.commands[words[0]]
    options = {name for option in command.params for name in option.opts}
    assert {word for word in words if word.startswith("--")} <= options
    assert words[1 + words.index("--host")] == "0.0.0.0"  # its own network; ports say who gets in


def test_the_image_runs_the_server_as_nobody_in_particular():
    text = (ROOT / "Dockerfile").read_text()
    check_command(json.loads(re.search(r"^CMD (.*)$", text, re.M)[1]))
    assert re.search(r"^USER (\d+)$", text, re.M)[1] != "0"
    assert re.search(r"^ARG BASE=\S+\nFROM \$\{BASE\}$", text, re.M)
    extras = re.search(r"^ARG EXTRAS=(\S+)$", text, re.M)[1].split(",")
    assert extras == ["cpu", "serve"]
    assert '"/src[${EXTRAS}]"' in text


def test_compose_opens_one_port_to_this_machine_and_wants_a_key():
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["visistage"]
    check_command(service["command"])
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["environment"]["VISISTAGE_API_KEY"].startswith("${VISISTAGE_API_KEY:?")
    assert service["read_only"]
    assert service["volumes"] == ["./engines:/engines:ro"]
    drain = next(o for o in main.commands["serve"].params if o.name == "drain_seconds").default
    assert int(service["stop_grace_period"].removesuffix("s")) > drain


def test_what_an_image_leaves_out_are_no_packages():
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")
    ]
    project = (ROOT / "pyproject.toml").read_text()
    rooms = set(re.findall(r'"visistage\.([a-z]+)[".]', project))
    assert rooms <= set(kept)
