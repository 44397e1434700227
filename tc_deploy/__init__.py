"""Token-cached Diffusion Transformers as compiled engines.

``load`` opens a built bundle and returns the pipeline that runs it::

    import tc_deploy

    with tc_deploy.load("engines/digits") as pipeline:
        images = pipeline(class_labels=[7], seed=0).images

Everything else is a command: see ``tc-deploy --help``. Importing the package imports no engine and no torch.
"""

# Not typing's: the command line begins here, and typing is much to import before it watches over what is imported.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from tc_deploy.runtime.pipeline import Pipeline as Pipeline
    from tc_deploy.runtime.pipeline import Result as Result
    from tc_deploy.runtime.pipeline import Step as Step
    from tc_deploy.runtime.pipeline import load as load

    __version__: str

__all__ = ["Pipeline", "Result", "Step", "__version__", "load"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("tc-deploy")
        except PackageNotFoundError:  # a tree that is not installed
            return "0+unknown"
    if name in ("Pipeline", "Result", "Step", "load"):
        from tc_deploy.runtime import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
