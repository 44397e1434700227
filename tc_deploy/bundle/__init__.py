"""Artefacts on disk: documents and checksums, folders that are whole or not there, files that replace none but ours."""

from tc_deploy.bundle.documents import (
    LARGEST_DOCUMENT_BYTES,
    MANIFEST,
    PLAN_DOCUMENT,
    Document,
    DocumentT,
    FileRecord,
    Files,
    canonical_json,
    check_files,
    file_records,
    first_problem,
    read_document,
    sha256_of_bytes,
    sha256_of_file,
)
from tc_deploy.bundle.folders import (
    Claim,
    check_replaceable,
    claimed,
    kept_from_writers,
    new_folder,
    remove_folder,
    remove_folders,
)
from tc_deploy.bundle.kinds import Earlier, FolderKind, NotOursError, file_names, foreign_names, known_document
from tc_deploy.bundle.outputs import FileKind, check_output, write_bytes, write_output
from tc_deploy.bundle.paths import absolute_path, path_from_here, real_path, relative_path
from tc_deploy.bundle.readers import reading
from tc_deploy.bundle.state import clear_state, state_folder, write_state
from tc_deploy.bundle.toml_files import path_beside, read_toml

__all__ = [
    "LARGEST_DOCUMENT_BYTES",
    "MANIFEST",
    "PLAN_DOCUMENT",
    "Claim",
    "Document",
    "DocumentT",
    "Earlier",
    "FileKind",
    "FileRecord",
    "Files",
    "FolderKind",
    "NotOursError",
    "absolute_path",
    "canonical_json",
    "check_files",
    "check_output",
    "check_replaceable",
    "claimed",
    "clear_state",
    "file_names",
    "file_records",
    "first_problem",
    "foreign_names",
    "kept_from_writers",
    "known_document",
    "new_folder",
    "path_beside",
    "path_from_here",
    "read_document",
    "read_toml",
    "reading",
    "real_path",
    "relative_path",
    "remove_folder",
    "remove_folders",
    "sha256_of_bytes",
    "sha256_of_file",
    "state_folder",
    "write_bytes",
    "write_output",
    "write_state",
]
