"""Signatures of bundles: who signed, what is covered, what is refused before an engine reads it."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import Made, edit_manifest, reseal, run_cli
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

import tc_deploy
from tc_deploy.backends.build import build_target
from tc_deploy.errors import BackendError, BundleError, UsageError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.signing import PASSWORD_VARIABLE, SIGNATURE, sign_bundle, verify_bundle


def save_keys(folder: Path, name: str, password: str = "") -> tuple[Path, Path]:
    key = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return save_keys(tmp_path, "team")


@pytest.fixture
def signed(mixed: Made, tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    """A built bundle that the team signed."""
    bundle = mixed.copy(tmp_path / "bundle")
    sign_bundle(bundle, keys[0])
    return bundle


def test_a_signed_bundle_loads_and_makes_pictures(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    verify_bundle(signed, keys[1])
    with tc_deploy.load(signed, require_signature=keys[1]) as pipeline:
        assert pipeline(class_labels=[1], seed=0).steps_full > 0
    wanted = ("--class-label", 1, "-o", tmp_path / "latents.npy")
    assert run_cli("generate", signed, *wanted, "--require-signature", keys[1]).code == 0


def test_the_signature_is_one_that_another_program_verifies(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    record = json.loads((signed / SIGNATURE).read_text(encoding="utf-8"))
    message = "tc-deploy bundle signature 1\n" + json.dumps(record["signs"], indent=2, sort_keys=True) + "\n"
    (tmp_path / "message").write_text(message, encoding="utf-8")
    (tmp_path / "signature").write_bytes(base64.b64decode(record["signature"]))
    words = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", str(keys[1])]
    words += ["-in", str(tmp_path / "message"), "-sigfile", str(tmp_path / "signature")]
    assert subprocess.run(words, check=False, capture_output=True).returncode == 0


def test_without_a_signature_a_bundle_is_refused_only_where_one_is_required(
    mixed: Made, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    with tc_deploy.load(mixed.bundle):
        pass
    with pytest.raises(BundleError, match=r"holds no signature.*tc-deploy sign"):
        tc_deploy.load(mixed.bundle, require_signature=keys[1])
    answer = run_cli(
        "generate",
        mixed.bundle,
        "--class-label",
        1,
        "-o",
        tmp_path / "x.npy",
        "--require-signature",
        keys[1],
    )
    assert answer.code == BundleError.exit_code
    assert not (tmp_path / "x.npy").exists()


def test_an_empty_key_is_no_leave_to_go_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script whose variable was not set wanted a signature to be asked for."""
    words = ("generate", tmp_path / "bundle", "--class-label", 1, "-o", tmp_path / "x.safetensors")
    monkeypatch.setenv("TC_DEPLOY_REQUIRE_SIGNATURE", "")
    answer = run_cli(*words)
    assert answer.code == UsageError.exit_code
    assert "TC_DEPLOY_REQUIRE_SIGNATURE is empty" in answer.err
    monkeypatch.delenv("TC_DEPLOY_REQUIRE_SIGNATURE")
    assert run_cli(*words, "--require-signature", "").code == UsageError.exit_code
    assert run_cli(*words).code == BundleError.exit_code


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    _, stranger = save_keys(tmp_path, "stranger")
    with pytest.raises(BundleError, match="not signed by the key"):
        tc_deploy.load(signed, require_signature=stranger)
    answer = run_cli("verify", signed, "--key", stranger)
    assert answer.code == BundleError.exit_code
    assert "not signed by the key" in answer.error


@pytest.mark.parametrize("what", ["a resealed manifest", "a resealed engine", "a swapped record", "a cut signature"])
def test_what_was_changed_after_signing_is_refused(signed: Path, keys: tuple[Path, Path], what: str) -> None:
    record = json.loads((signed / SIGNATURE).read_text(encoding="utf-8"))
    match what:
        case "a resealed manifest":
            edit_manifest(signed, lambda document: document.update(made_by="somebody"))
            reseal(signed)
        case "a resealed engine":
            path = signed / "onnxruntime" / "manifest.json"
            document = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(document | {"made_by": "somebody"}), encoding="utf-8")
        case "a swapped record":  # the hashes made right again, the signature left as it was
            edit_manifest(signed, lambda document: document.update(made_by="somebody"))
            from tc_deploy.bundle import sha256_of_file

            record["signs"]["manifest.json"] = sha256_of_file(signed / "manifest.json")
            (signed / SIGNATURE).write_text(json.dumps(record), encoding="utf-8")
        case _:
            record["signature"] = record["signature"][:-8]
            (signed / SIGNATURE).write_text(json.dumps(record), encoding="utf-8")
    for use in (verify_bundle, lambda path, key: tc_deploy.load(path, require_signature=key)):
        with pytest.raises(BundleError):
            use(signed, keys[1])


def test_an_altered_file_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    weights = signed / "onnx" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin"):
        verify_bundle(signed, keys[1])
    with pytest.raises(BundleError, match=r"weights\.bin"):
        sign_bundle(signed, keys[0])


def test_an_engine_that_was_built_later_is_not_covered(signed: Path, keys: tuple[Path, Path]) -> None:
    build_target(signed, "openvino")
    with pytest.raises(BundleError, match=r"openvino.*was added after the bundle was signed"):
        tc_deploy.load(signed, "openvino", require_signature=keys[1])
    with tc_deploy.load(signed, "onnxruntime", require_signature=keys[1]):
        pass
    assert run_cli("sign", signed, "--key", keys[0]).out.rstrip().endswith("2 targets (onnxruntime, openvino)")
    verify_bundle(signed, keys[1])


def test_an_encrypted_key_takes_its_password_from_the_environment(
    mixed: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    private, public = save_keys(tmp_path, "locked", "open sesame")
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    with pytest.raises(UsageError, match=PASSWORD_VARIABLE):
        sign_bundle(bundle, private)
    monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
    with pytest.raises(UsageError, match="another password"):
        sign_bundle(bundle, private)
    monkeypatch.setenv(PASSWORD_VARIABLE, "open sesame")
    sign_bundle(bundle, private)
    verify_bundle(bundle, public)
    plain, _ = save_keys(tmp_path, "plain")  # a password that is not needed does no harm
    sign_bundle(bundle, plain)


def test_a_file_that_is_no_such_key_is_a_usage_error(mixed: Made, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    other = tmp_path / "other.pem"
    key = generate_private_key(SECP256R1())
    other.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "text.pem").write_text("no key", encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (other, "expected an ed25519 key"),
        (tmp_path / "text.pem", "not a private key"),
        (keys[1], "not a private key"),
        (tmp_path, "a folder, and no file"),
        (tmp_path / "pipe", "a pipe, and no file"),
        (tmp_path / "missing", "openssl genpkey"),
    ):
        answer = run_cli("sign", mixed.bundle, "--key", path)
        assert answer.code == UsageError.exit_code
        assert says in answer.error
    assert not (mixed.bundle / SIGNATURE).exists()
    answer = run_cli("verify", mixed.bundle, "--key", keys[0])
    assert answer.code == UsageError.exit_code
    assert "not a public key" in answer.error


def test_an_engine_that_was_removed_is_missed(signed: Path, keys: tuple[Path, Path]) -> None:
    shutil.rmtree(signed / "onnxruntime")
    with pytest.raises(BundleError, match=r"onnxruntime.manifest\.json: was removed after the bundle was signed"):
        verify_bundle(signed, keys[1])


def test_without_the_library_the_message_says_what_to_install(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=r"^cryptography is not installed: pip install"):
        tc_deploy.load(signed, require_signature=keys[1])


def test_a_signed_bundle_is_exported_again_and_its_signature_goes(
    mixed: Made, signed: Path, keys: tuple[Path, Path]
) -> None:
    export_bundle(mixed.plan, signed, ExportOptions(check=False, graphs_from=(mixed.bundle,)))
    assert not (signed / SIGNATURE).exists()
    with pytest.raises(BundleError, match="holds no signature"):
        verify_bundle(signed, keys[1])


def test_what_nobody_signed_is_named(signed: Path, keys: tuple[Path, Path]) -> None:
    assert "not covered" not in run_cli("verify", signed, "--key", keys[1]).out
    (signed / "notes" / "deep").mkdir(parents=True)
    (signed / "notes" / "deep" / "a.txt").write_text("mine")
    (signed / "onnx" / "\x1b[2Jmore.onnx").write_bytes(b"")
    (signed / "empty").mkdir()
    answer = run_cli("verify", signed, "--key", keys[1])
    assert answer.code == 0, answer.err
    last = answer.out.splitlines()[-1]
    assert last == "not covered by the signature: empty/, notes/deep/a.txt, onnx/\\x1b[2Jmore.onnx"
    for index in range(5):
        (signed / f"zz{index}").touch()
    assert run_cli("verify", signed, "--key", keys[1]).out.splitlines()[-1].endswith(", zz0, zz1 and 3 more")


def test_a_bundle_that_was_half_replaced_is_put_right_before_it_is_signed_and_verified(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    holder = signed.with_name(f".{signed.name}.tc-deploy")
    for use in (lambda: sign_bundle(signed, keys[0]), lambda: verify_bundle(signed, keys[1])):
        # What a process leaves that dies between its two renames.
        holder.mkdir()
        (holder / "owner.json").write_text('{"kind": "holder", "format_version": 1, "made_by": "tc-deploy 0"}')
        signed.rename(holder / "old")
        use()
        assert signed.is_dir()
        assert not holder.exists()
