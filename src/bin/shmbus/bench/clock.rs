//! Time in ticks of the cheapest trustworthy clock: the time stamp counter (10 ns a read), else CLOCK_MONOTONIC.

use std::time::{Duration, Instant};

/// How long the counter is held against CLOCK_MONOTONIC: an error of 1 µs at either end is one part in 10,000.
const CALIBRATION: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    counter: bool,
    origin: Instant,
    ns_per_tick: f64,
}

impl Clock {
    pub(super) fn calibrate() -> Clock {
        let origin = Instant::now();
        let mut clock = Clock { counter: counter_is_steady(), origin, ns_per_tick: 1.0 };
        if clock.counter {
            let (started, first) = (Instant::now(), clock.ticks());
            std::thread::sleep(CALIBRATION);
            let (ns, ticks) = (started.elapsed().as_nanos() as f64, clock.ticks() - first);
            clock.ns_per_tick = ns / ticks as f64;
        }
        clock
    }

    #[inline]
    pub(super) fn ticks(&self) -> u64 {
        #[cfg(target_arch = "x86_64")]
        if self.counter {
            // SAFETY: every x86-64 processor has RDTSC, and Linux leaves it enabled for user code.
            return unsafe { std::arch::x86_64::_rdtsc() };
        }
        self.origin.elapsed().as_nanos() as u64
    }

    pub(super) fn ns(&self, ticks: u64) -> f64 {
        ticks as f64 * self.ns_per_tick
    }
}

/// Whether the counter runs at one speed, in every state of the processor, as the kernel found out.
fn counter_is_steady() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cfg!(target_arch = "x86_64") && flags.split_whitespace().any(|flag| flag == "constant_tsc")
}
