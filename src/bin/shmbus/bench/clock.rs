//! Time in ticks of the cheapest trustworthy clock: the time stamp counter (10 ns a read), else CLOCK_MONOTONIC.

use std::time::{Duration, Instant};

/// How long the counter is held against CLOCK_MONOTONIC: an error of 1 µs at either end is one part in 10,000.
const CALIBRATION: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    counter: bool,
    origin: Instant,
    ns_per_tick: f64,
    /// By how many ticks the clock moves at a time.
    step_ticks: f64,
}

impl Clock {
    pub(super) fn calibrate() -> Clock {
        let origin = Instant::now();
        let mut clock = Clock { counter: counter_is_steady(), origin, ns_per_tick: 1.0, step_ticks: 1.0 };
        if clock.counter {
            let (started, first) = (Instant::now(), clock.ticks());
            std::thread::sleep(CALIBRATION);
            let (ns, ticks) = (started.elapsed().as_nanos() as f64, clock.ticks() - first);
            clock.ns_per_tick = ns / ticks as f64;
        }
        clock.step_ticks = step_of(&(0..4096).map(|i| clock.ticks_of_work(i % 64)).collect::<Vec<_>>());
        clock
    }

    /// How long a little work of some length takes; its length varies so that multiples of the step show.
    fn ticks_of_work(&self, rounds: u64) -> u64 {
        let first = self.ticks();
        for round in 0..rounds {
            std::hint::black_box(round);
        }
        self.ticks() - first
    }

    /// Steps of the clock in so many ticks.
    pub(super) fn steps(&self, ticks: u64) -> u64 {
        (ticks as f64 / self.step_ticks).round() as u64
    }

    /// Nanoseconds in so many steps.
    pub(super) fn steps_ns(&self, steps: f64) -> f64 {
        steps * self.step_ticks * self.ns_per_tick
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

/// AMD's counter moves only every 10 ns (26 ticks at 2.6 GHz), however often it is read: then nearly every difference is
/// a multiple of the smallest common one. Otherwise the step is one tick.
fn step_of(differences: &[u64]) -> f64 {
    let mut moved: Vec<u64> = differences.iter().copied().filter(|&d| d > 1).collect();
    moved.sort_unstable();
    let Some(&candidate) = moved.get(moved.len() / 10) else { return 1.0 };
    let candidate = candidate as f64;
    let near = |d: &&u64| (**d as f64 / candidate - (**d as f64 / candidate).round()).abs() < 0.1;
    let multiples: Vec<&u64> = moved.iter().filter(near).collect();
    if candidate < 8.0 || multiples.len() * 20 < moved.len() * 19 {
        return 1.0;
    }
    let (ticks, steps) = multiples
        .iter()
        .fold((0.0, 0.0), |(ticks, steps), d| (ticks + **d as f64, steps + (**d as f64 / candidate).round()));
    ticks / steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_fine_and_coarse_counters() {
        let coarse: Vec<u64> = (0..1000).map(|i| (i % 4) * 26 - u64::from(i % 8 == 3)).collect();
        assert!((step_of(&coarse) - 26.0).abs() < 0.2, "{}", step_of(&coarse));
        let fine: Vec<u64> = (0..1000).map(|i| 20 + i % 17).collect();
        assert_eq!(step_of(&fine), 1.0);
        assert_eq!(step_of(&[]), 1.0);
    }
}
