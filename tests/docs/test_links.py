"""Links of README and docs/ lead somewhere, and the site builds without a warning."""

import os
import re
import subprocess
import sys

import pytest

from support.pages import PAGES, ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in LINK.findall(text):
        path = target.partition("#")[0]
        if path and "://" not in path:
            assert (page.parent / path).exists(), f"{page.name}: {target}"


def test_every_page_is_reached_from_the_readme():
    seen, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = [link.partition("#")[0] for link in LINK.findall(page.read_text())]
        left += [
            (page.parent / path).resolve()
            for path in targets
            if path.endswith(".md") and "://" not in path
        ]
    assert set(PAGES) <= seen


def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    options = (tmp_path / "options" / "index.html").read_text()
    assert "<td><code>patience</code></td>" in options
    # Links that leave docs/ are told as paths.
    gpu = (tmp_path / "gpu" / "index.html").read_text()
    assert "tools/gpu/README.md</code>" in gpu and "../tools" not in gpu
    assert '<pre class="mermaid">' in (tmp_path / "architecture/index.html").read_text()
