//! The clock that leases end by: CLOCK_MONOTONIC_COARSE, which all processes share and which costs a few nanoseconds. And a
//! thread's own.

use std::sync::OnceLock;
use std::time::Duration;

use nix::time::{ClockId, clock_getres, clock_gettime};

/// Milliseconds, rounded down; up to [`step_ms`] behind.
#[inline]
pub(crate) fn now_ms() -> u64 {
    // The kernel refuses only clocks it does not have; this one is as old as the calls this crate needs.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).expect("CLOCK_MONOTONIC_COARSE");
    now.tv_sec() as u64 * 1000 + now.tv_nsec() as u64 / 1_000_000
}

/// The first moment of [`now_ms`] at which `ms` milliseconds have certainly passed since the moment it was `now`.
#[inline]
pub(crate) fn after(now: u64, ms: u64) -> u64 {
    // It may have been a step later than the clock said, and a millisecond later than what was rounded down.
    now + ms + step_ms() + 1
}

/// How long this thread has run.
pub(crate) fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("CLOCK_THREAD_CPUTIME_ID").into()
}

/// How long the clock stands still between two steps, rounded up.
fn step_ms() -> u64 {
    static STEP_MS: OnceLock<u64> = OnceLock::new();
    *STEP_MS.get_or_init(|| {
        let step = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).expect("CLOCK_MONOTONIC_COARSE");
        (step.tv_sec() as u64 * 1_000_000_000 + step.tv_nsec() as u64).div_ceil(1_000_000).max(1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn what_is_after_is_never_too_soon() {
        for _ in 0..3 {
            let start = Instant::now();
            let end = after(now_ms(), 5);
            while now_ms() < end {
                std::thread::yield_now();
            }
            assert!(start.elapsed() >= Duration::from_millis(5), "{:?}", start.elapsed());
        }
    }
}
