//! Pipelines, routes and runners: what serves messages on and on.

use super::open::OpenError;
use super::publish::PublishError;
use super::receive::RecvError;
use super::settle::AckError;
use crate::ring::sequence::Sequence;

/// Why a pipeline's step did not come to its end. The input is not lost: it goes back to its group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// No input was received.
    #[error(transparent)]
    Recv(#[from] RecvError),
    /// The outputs were not published. After [`PublishError::Fenced`] open another pipeline.
    #[error("publishing the outputs: {0}")]
    Publish(#[from] PublishError),
    /// The input could not be settled.
    #[error("settling the input: {0}")]
    Ack(#[from] AckError),
}

/// Why a route was not opened, or cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RouteError {
    /// What the route puts into its output would come back to it.
    #[error("routing {from} to {to} would never end: {path}")]
    Loop {
        /// Topic or pattern.
        from: String,
        /// The output topic.
        to: String,
        /// By what it would come back, and what to do about it.
        path: String,
    },
    /// A topic cannot be read or written.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// An input was not routed.
    #[error("route from topic {topic:?}: {source}")]
    Step {
        /// The input's topic.
        topic: String,
        /// What happened.
        source: PipelineError,
    },
}

/// What a [`Runner`](crate::Runner) has come upon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunnerError {
    /// Nothing can come from this handle any more; it is not served any longer.
    #[error("{handle} is not served any more: {source}")]
    Ended {
        /// Topic, pattern or group.
        handle: String,
        /// Why.
        source: RecvError,
    },
    /// A handler was done with a message, and settling it failed: its lease had ended, so another consumer gets it, or has it.
    /// Longer leases, or `extend`, prevent that.
    #[error("{handle}: message {sequence} was handled, but could not be settled: {source}")]
    NotSettled {
        /// The group.
        handle: String,
        /// The message.
        sequence: Sequence,
        /// Why.
        source: AckError,
    },
}
