//! The canary: two cache lines, one each way, nothing else. What this costs is the machine's; the rest is ours.

use std::sync::atomic::Ordering;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::clock::Clock;
use super::pair::{Order, Pair, Peer};

/// Length of one canary chunk.
const CHUNK_NS: f64 = 1_000_000.0;

/// How near the two cores are to each other at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Class {
    /// Two threads of one core.
    Smt,
    /// Two cores on one L3 cache.
    Ccx,
    /// Two cores on different L3 caches.
    Far,
}

impl std::fmt::Display for Class {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Class::Smt => "SMT",
            Class::Ccx => "CCX",
            Class::Far => "FAR",
        })
    }
}

impl Class {
    /// The bounds are geometric means of the medians measured on Zen 4 at its usual clock: 49 ns (SMT), 113 ns (CCX)
    /// and 496 ns (FAR). They belong to that generation of machines; elsewhere the names are only as good as that, but
    /// a ratio to the bare figure of the same class still is one.
    fn of(round_trip_p50_ns: f64) -> Class {
        match round_trip_p50_ns {
            ns if ns < 75.0 => Class::Smt,
            ns if ns < 250.0 => Class::Ccx,
            _ => Class::Far,
        }
    }
}

/// Quantiles of one chunk of round trips, bare or on the bus.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quantiles {
    pub(super) p50_ns: f64,
    pub(super) p99_ns: f64,
    pub(super) p999_ns: f64,
}

impl Quantiles {
    /// Of durations in nanoseconds, taken one by one.
    pub(super) fn of_ns<'a>(durations: impl Iterator<Item = &'a u64>) -> Quantiles {
        let mut histogram = Histogram::<u64>::new_with_bounds(1, 1 << 40, 3).expect("constant bounds are valid");
        durations.for_each(|&ns| histogram.saturating_record(ns));
        let quantile = |q| histogram.value_at_quantile(q) as f64;
        Quantiles { p50_ns: quantile(0.5), p99_ns: quantile(0.99), p999_ns: quantile(0.999) }
    }

    /// From the moments at which round trips ended; the first is when the first one began. Each round trip includes
    /// one read of the clock, bare and on the bus alike.
    pub(super) fn of_stamps(clock: &Clock, stamps: &[u64]) -> Quantiles {
        let mut histogram = Histogram::<u64>::new_with_bounds(1, 1 << 40, 3).expect("constant bounds are valid");
        for pair in stamps.windows(2) {
            histogram.saturating_record(clock.steps(pair[1].saturating_sub(pair[0])));
        }
        let quantile = |q| clock.steps_ns(interpolated(&histogram, q));
        Quantiles { p50_ns: quantile(0.5), p99_ns: quantile(0.99), p999_ns: quantile(0.999) }
    }
}

/// The quantile of values that a coarse clock has rounded: those counted at `v` are taken to lie evenly between
/// `v - 0.5` and `v + 0.5`. A median of 11.3 steps of 10 ns would read as 110 or 120 ns otherwise.
fn interpolated(histogram: &Histogram<u64>, q: f64) -> f64 {
    let value = histogram.value_at_quantile(q);
    let below = histogram.count_between(0, value.saturating_sub(1)) as f64;
    let at = histogram.count_at(value).max(1) as f64;
    let share = ((q * histogram.len() as f64 - below) / at).clamp(0.0, 1.0);
    value as f64 - 0.5 + share
}

/// What the bare machine did in one chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Canary(pub(super) Quantiles);

impl Canary {
    pub(super) fn class(&self) -> Class {
        Class::of(self.0.p50_ns)
    }

    /// Between the chunks before and after.
    pub(super) fn mean(&self, other: &Canary) -> Canary {
        let mean = |f: fn(&Quantiles) -> f64| (f(&self.0) + f(&other.0)) / 2.0;
        Canary(Quantiles { p50_ns: mean(|q| q.p50_ns), p99_ns: mean(|q| q.p99_ns), p999_ns: mean(|q| q.p999_ns) })
    }
}

/// One chunk of bare round trips, this side.
pub(super) fn measure(pair: &mut Pair) -> anyhow::Result<Canary> {
    let count = (CHUNK_NS / pair.bare_p50_ns).clamp(100.0, 50_000.0) as u64;
    pair.begin(Order::Canary, count, 0);
    let base = pair.lines().pong.load(Ordering::Relaxed);
    let mut stamps = std::mem::take(&mut pair.stamps);
    stamps.clear();
    stamps.push(pair.clock.ticks());
    for number in base + 1..=base + count {
        pair.lines().ping.store(number, Ordering::Release);
        pair.spin_until(|lines| lines.pong.load(Ordering::Acquire) == number)?;
        stamps.push(pair.clock.ticks());
    }
    let quantiles = Quantiles::of_stamps(&pair.clock, &stamps);
    pair.stamps = stamps;
    pair.finish()?;
    pair.bare_p50_ns = quantiles.p50_ns.max(1.0);
    Ok(Canary(quantiles))
}

/// One chunk of bare round trips, the other side.
pub(super) fn answer(peer: &Peer, count: u64) -> anyhow::Result<()> {
    let base = peer.lines().pong.load(Ordering::Relaxed);
    for number in base + 1..=base + count {
        peer.spin_until(|lines| lines.ping.load(Ordering::Acquire) == number)?;
        peer.lines().pong.store(number, Ordering::Release);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_the_measured_medians() {
        assert_eq!([49.0, 113.0, 496.0].map(Class::of), [Class::Smt, Class::Ccx, Class::Far]);
    }

    #[test]
    fn a_coarse_clock_is_seen_through() {
        let mut histogram = Histogram::<u64>::new_with_bounds(1, 1 << 40, 3).unwrap();
        histogram.record_n(11, 700).unwrap();
        histogram.record_n(12, 300).unwrap();
        assert!((interpolated(&histogram, 0.5) - 11.21).abs() < 0.01);
    }
}
