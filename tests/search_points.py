"""Points of a search as tests need them: any kind, latency and quality."""

from tc_deploy.plan import CacheRecord, ScheduleRecord
from tc_deploy.quality.record import Quality
from tc_deploy.search.record import Kind, PointRecord, SettingsRecord
from tc_deploy.types import Attention, Reuse, Skip


def point(kind: Kind, name: str, ratio: float, psnr_db: float, keep: int = 0) -> PointRecord:
    cache = CacheRecord(
        reuse=Reuse.BRANCH,
        attention=Attention.ALL,
        forecast_order=1,
        keep_counts=((keep,) * 2, (keep,) * 2),
        skip=Skip.MODEL,
    )
    settings = SettingsRecord(
        scheduler_class="DDIMScheduler",
        schedule=ScheduleRecord(steps=10, phase_start=5, cache_interval_early=2, cache_interval_late=2),
        cache=cache,
    )
    quality = Quality(psnr_db=psnr_db, psnr_db_std=1.0, ssim=None, frechet_distance=None, class_accuracy=None)
    return PointRecord(
        name=name,
        kind=kind,
        runtime="pytorch" if kind is Kind.CACHE_DIT else "engines",
        settings=None if kind is Kind.CACHE_DIT else settings,
        steps_full=5,
        steps_cached=5,
        cost_in_full_steps=5.0,
        latency_ms=100 * ratio,
        latency_ratio=ratio,
        latency_iqr=0.0,
        quality=quality,
        converged_psnr_db=None,
        drift=None,
        on_front=False,
    )
