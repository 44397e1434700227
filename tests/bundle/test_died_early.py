"""What a process leaves that died before it had written anything of its own."""

from pathlib import Path

from tc_deploy.bundle import claimed
from tc_deploy.bundle.state import state_folder, write_state
from tc_deploy.plan import PLAN_FOLDER


def test_a_state_whose_first_record_was_never_whole(tmp_path: Path) -> None:
    with claimed(tmp_path / "plan", PLAN_FOLDER) as claim:
        folder = claim.holder / "calibrate-1"
        folder.mkdir()
        (folder / ".state.json.tc-deploy-123").write_bytes(b'{"kind"')
        assert state_folder(claim, "calibrate", "1") == folder
        write_state(folder / "data", b"kept")
        assert sorted(path.name for path in folder.iterdir()) == ["data", "state.files", "state.json"]
