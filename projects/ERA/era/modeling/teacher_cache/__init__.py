"""What a frozen teacher says of a picture, computed once (``MODEL.TEACHER.CACHE``)."""

from era.modeling.teacher_cache.cache import (
    OFF,
    TeacherCache,
    build_teacher_cache,
    cache_folder,
    is_on,
)

__all__ = ["OFF", "TeacherCache", "build_teacher_cache", "cache_folder", "is_on"]
