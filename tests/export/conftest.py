"""The fixtures of `small_run`, for all tests in this folder."""

from tests.export.small_run import digit_images, exported_run, trained_run  # noqa: F401
