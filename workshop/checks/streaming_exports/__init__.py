"""The checks of exercise 04: an export in a container, a change of many rows, and a delivery that takes its time."""

from workshop.checks.streaming_exports.export_under_64_mib import export_under_64_mib
from workshop.checks.streaming_exports.hold_no_connection import hold_no_connection
from workshop.checks.streaming_exports.mark_the_jobs_done import mark_the_jobs_done

__all__ = ["export_under_64_mib", "hold_no_connection", "mark_the_jobs_done"]
