"""The files for pipelines, as far as they go without their hosts: they parse, and every command in them exists."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from metadiff_cli import __version__
from metadiff_cli.app import app

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The values of the options that a command line gives, by Typer itself; the command is not run."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    values: dict[str, Any] = command.make_context("metadiff", arguments).params
    return values


def test_the_hook_verifies_a_folder() -> None:
    program, *arguments = shlex.split(HOOK["entry"])
    assert program == "metadiff" and HOOK["pass_filenames"] is False and HOOK["language"] == "python"
    values = parsed([*arguments, "photos"])
    assert values["folder"] == Path("photos") and values["quiet"] is True


def steps(command: str, folder: Path, **given: str) -> list[str]:
    """The arguments that the action's script hands to metadiff, with the defaults of its inputs."""
    (step,) = [step for step in ACTION["runs"]["steps"] if step.get("id") == "run"]
    inputs = {name: value["default"] for name, value in ACTION["inputs"].items()} | given | {"command": command}
    folder.mkdir()
    (folder / "metadiff").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (folder / "metadiff").chmod(0o755)
    environment = {key: inputs[re.search(r"inputs\.([\w-]+)", text)[1]] for key, text in step["env"].items()}  # type: ignore[index]
    environment |= {
        "RUNNER_TEMP": str(folder),
        "GITHUB_OUTPUT": str(folder / "output"),
        "PATH": f"{folder}:/usr/bin:/bin",
    }
    subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], check=True, env=environment, cwd=folder)
    written = dict(line.split("=", 1) for line in (folder / "output").read_text().splitlines())
    assert set(written) == set(ACTION["outputs"]) and Path(written["report"]).name == "metadiff-report.html"
    return Path(written["result"]).read_text().splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_action_runs_commands_with_options_that_exist(tmp_path: Path) -> None:
    values = parsed(steps("evaluate", tmp_path / "a", data="my photos", **{"fail-under": "90"}))
    assert values["data"] == [Path("my photos")] and values["fail_under"] == 90 and values["shot"] == 5
    assert values["split"] == "all" and values["as_json"] is True and values["checkpoint"] is None
    values = parsed(steps("adapt", tmp_path / "b", support="i", query="q", arguments="--reject-below 0.5 --top-k 2"))
    assert values["support"] == Path("i") and values["reject_below"] == 0.5 and values["top_k"] == 2
    values = parsed(steps("adapt", tmp_path / "c", support="i", query="q; rm *", checkpoint="hf://a/b/c@v1"))
    assert values["query"] == ["q; rm *"] and values["checkpoint"] == Path("hf://a/b/c@v1")
    with pytest.raises(subprocess.CalledProcessError):
        steps("doctor", tmp_path / "d")


def test_inputs_never_become_text_of_the_script() -> None:
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", "")
        assert "run" not in step or step["shell"] == "bash"


def test_the_report_is_uploaded_when_the_gate_is_not_met() -> None:
    upload = ACTION["runs"]["steps"][-1]
    assert upload["if"] == "always()" and upload["uses"].startswith("actions/upload-artifact@")


def blocks() -> list[Any]:
    """The YAML that the page offers to copy."""
    return [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]


def used(block: Any) -> list[dict[str, Any]]:
    """The steps of a block that use the action."""
    found = block if isinstance(block, list) else [s for job in block.get("jobs", {}).values() for s in job["steps"]]
    return [step for step in found if step.get("uses", "").startswith("OWNER/REPO@")]


def test_files_to_copy_name_inputs_hooks_and_versions_that_exist() -> None:
    given = [step for block in blocks() for step in used(block)]
    assert len(given) == 2
    for step in given:
        assert set(step["with"]) <= set(ACTION["inputs"]) and step["uses"].endswith(f"@v{__version__}")
    hooks = [repo for block in blocks() if isinstance(block, dict) for repo in block.get("repos", [])]
    assert [repo["hooks"][0]["id"] for repo in hooks] == [HOOK["id"], HOOK["id"]]
    assert hooks[0]["rev"] == f"v{__version__}"
    assert parsed(shlex.split(hooks[1]["hooks"][0]["entry"])[1:])["folder"] == Path("photos")


def test_the_page_describes_every_input() -> None:
    table = PAGE.partition("| input |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", table)) >= set(ACTION["inputs"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_parse_and_have_no_more_rights_than_they_need(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert set(job.get("permissions", {})) <= {"id-token"}
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            for line in re.findall(r"^\s*metadiff (.*)$", step.get("run", ""), re.M):
                parsed(line.split())


def test_the_image_runs_the_tool_and_has_what_the_wheel_needs() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["metadiff"]' in text and "USER metadiff" in text
    assert re.search(r"torch torchvision --index-url \S+/cpu$", text, re.M)
    kept = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M))
    assert kept == {"LICENSE", "NOTICE", "README.md", "metadiff_cli", "presets", "pyproject.toml"}
    assert all((ROOT / name).exists() for name in kept)


def test_the_citation_file_has_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["version"] == __version__ and citation["license"] == "MIT"
    assert citation["references"][0]["title"].startswith("MetaDiff")
