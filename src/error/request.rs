//! Requests and replies.

use super::open::OpenError;
use super::publish::PublishError;
use super::receive::RecvError;

/// Why a request brought no reply.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// Nobody reads the topic, or the last who did has left without a reply. In the latter case the request may have been
    /// worked on.
    #[error("nobody responds on topic {topic:?}; start a responder")]
    NoResponder {
        /// The request topic.
        topic: String,
    },
    /// No reply came in time. The request may be worked on yet.
    #[error("no reply on topic {topic:?} within {limit:?}")]
    DeadlineExceeded {
        /// The request topic.
        topic: String,
        /// How long was waited.
        limit: std::time::Duration,
    },
    /// The request was not published.
    #[error("the request was not sent: {0}")]
    Publish(#[from] PublishError),
    /// The inbox cannot be read any more: open another requester.
    #[error("the inbox for replies: {0}")]
    Inbox(RecvError),
}

/// Why a reply was not delivered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplyError {
    /// The message carries no address to reply to, or one that is no inbox.
    #[error("the message is no request: it names no inbox to reply to")]
    NoAddress,
    /// The requester has left.
    #[error("the requester has left")]
    Gone,
    /// Its inbox takes no reply, or none of this size.
    #[error("the requester's inbox: {0}")]
    Publish(PublishError),
    /// Its inbox cannot be opened, or is none that a requester makes ([`Refusal::Options`](crate::Refusal::Options)): larger, say.
    #[error("the requester's inbox: {0}")]
    Open(OpenError),
}
