"""Publishing that ends at any of its requests to the Hub: the next call continues, and no file here is touched."""

from pathlib import Path

import pytest

from bitwright.converter.job.progress import Progress
from bitwright.converter.publishing.repository import HubRepository
from bitwright.converter.publishing.stage import Target, publish
from bitwright.formats.files.disk import observed
from tests.converter.publishing.publishing import ALICE, TO, TOKEN, here
from tests.converter.publishing.writable_hub import WritableHub
from tests.faults import scenarios
from tests.faults.disk import read_state
from tests.faults.scenarios import SCENARIOS, WORK, begin


class Killed(BaseException):
    """Like a kill: nothing but the Hub and the disk remembers what was done."""


@pytest.fixture(scope="module", params=["plain", "smoothed directory"])
def artifact(request, models, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published") / "root"
    begin(root)
    scenarios.run(SCENARIOS[request.param], models, root)
    return root / SCENARIOS[request.param].output


def published(artifact: Path, hub: WritableHub) -> dict[str, bytes]:
    name = None if artifact.is_dir() else "Tiny-113K-v1.0-Q4.gguf"
    publish(artifact, Target(TO, name=name), Progress(quiet=True), work_dir=artifact.parent / WORK)
    return hub.files(TO)


def killed_at(number: int, artifact: Path, hub: WritableHub, monkeypatch, answered: bool) -> bool:
    """Publish up to this request; whether there is one. answered: the Hub has done what was asked."""
    ask, left = HubRepository._ask, number

    def counted(self, call):
        nonlocal left
        left -= 1
        if left >= 0:
            return ask(self, call)
        if answered:
            ask(self, call)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(HubRepository, "_ask", counted)
        try:
            published(artifact, hub)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("answered", [False, True])
def test_killed_at_every_request(artifact, answered, monkeypatch):
    before = read_state(artifact.parent)
    steps: list[object] = []
    with observed(lambda step, path: steps.append((step, path))):
        with here(monkeypatch, {TOKEN: ALICE}) as hub:
            expected = published(artifact, hub)
        for number in range(100):
            with here(monkeypatch, {TOKEN: ALICE}) as hub:
                if not killed_at(number, artifact, hub, monkeypatch, answered):
                    break
                assert published(artifact, hub) == expected
                assert len(hub.repositories[TO].commits) == 2  # the Hub's own first one, and ours
    assert number > 5 and not steps and read_state(artifact.parent) == before
