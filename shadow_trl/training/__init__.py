"""TRL's trainers on BASE that end in a graft."""

from ..runtime.versions import check_releases

check_releases()  # before a module of this folder imports a library that may be of another release
