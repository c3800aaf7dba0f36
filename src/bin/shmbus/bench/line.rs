//! A JSON line with every figure that any workload has, null where it does not apply.

use serde::Serialize;

use super::canary::{Class, Quantiles};
use super::report::{median, rounded};
use super::{Chunk, Stage};

/// One line: what all workloads have, and what one has beside it.
#[derive(Serialize)]
pub(super) struct Line<E> {
    workload: String,
    payload_bytes: Option<u64>,
    mode: String,
    pub(super) class: Class,
    pub(super) chunks: usize,
    #[serde(flatten)]
    pub(super) figures: Figures,
    #[serde(flatten)]
    pub(super) extra: E,
}

impl<E> Line<E> {
    pub(super) fn new(stage: &Stage<'_>, class: Class, chunks: usize, figures: Figures, extra: E) -> Line<E> {
        let setup = &stage.task.setup;
        Line {
            workload: stage.task.workload.to_string(),
            payload_bytes: Some(setup.payload_bytes()),
            mode: shmbus::Mode::from(setup.mode).to_string(),
            class,
            chunks,
            figures,
            extra,
        }
    }

    /// The same for a workload without messages.
    pub(super) fn without_payload(self) -> Line<E> {
        Line { payload_bytes: None, ..self }
    }
}

#[derive(Serialize, Default)]
pub(super) struct Figures {
    pub(super) p50_ns: Option<f64>,
    pub(super) p99_ns: Option<f64>,
    pub(super) p999_ns: Option<f64>,
    pub(super) bare_p50_ns: Option<f64>,
    pub(super) bare_p99_ns: Option<f64>,
    pub(super) bare_p999_ns: Option<f64>,
    pub(super) ratio_p50: Option<f64>,
    pub(super) ratio_p99: Option<f64>,
    pub(super) messages_per_s: Option<f64>,
    pub(super) bytes_per_s: Option<f64>,
    pub(super) bare_bytes_per_s: Option<f64>,
    pub(super) lost: Option<u64>,
}

impl Figures {
    /// Only the bare ping-pong, for workloads that have nothing nearer to compare with.
    pub(super) fn of_canary<S>(chunks: &[&Chunk<S>]) -> Figures {
        let bare = |f: fn(&Quantiles) -> f64| Some(rounded(median(chunks.iter().map(|c| f(&c.bare.0))), 10.0));
        Figures {
            bare_p50_ns: bare(|q| q.p50_ns),
            bare_p99_ns: bare(|q| q.p99_ns),
            bare_p999_ns: bare(|q| q.p999_ns),
            ..Figures::default()
        }
    }

    /// Latencies beside bare ones.
    pub(super) fn of_latencies(ours: &Quantiles, bare: &Quantiles) -> Figures {
        Figures {
            p50_ns: Some(ours.p50_ns),
            p99_ns: Some(ours.p99_ns),
            p999_ns: Some(ours.p999_ns),
            bare_p50_ns: Some(bare.p50_ns),
            bare_p99_ns: Some(bare.p99_ns),
            bare_p999_ns: Some(bare.p999_ns),
            ratio_p50: Some(rounded(ours.p50_ns / bare.p50_ns, 1000.0)),
            ratio_p99: Some(rounded(ours.p99_ns / bare.p99_ns, 1000.0)),
            ..Figures::default()
        }
    }

    /// p50, p99 and p99.9, ours and the bare ones, in microseconds, and the ratio of the medians: cells of a table.
    pub(super) fn latency_cells(&self) -> Vec<String> {
        let ours = [self.p50_ns, self.p99_ns, self.p999_ns];
        let bare = [self.bare_p50_ns, self.bare_p99_ns, self.bare_p999_ns];
        let cells = ours.into_iter().chain(bare).map(|ns| format!("{:.1}", ns.unwrap_or(f64::NAN) / 1e3));
        cells.chain([crate::output::times(self.ratio_p50.unwrap_or(f64::NAN))]).collect()
    }
}

/// Heads of [`Figures::latency_cells`].
pub(super) const LATENCY_HEADS: [&str; 7] =
    ["P50 µs", "P99 µs", "P99.9 µs", "BARE P50", "BARE P99", "BARE P99.9", "RATIO P50"];
