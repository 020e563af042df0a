"""What people launch: data, options, comparison, report, the pipeline of two stages."""

from ..runtime.versions import check_releases

check_releases()  # before a module of this folder imports a library that may be of another release
