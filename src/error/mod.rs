//! Errors: one enum an operation, each with what was expected, what was found and what to do.

mod flow;
mod open;
mod publish;
mod receive;
mod refusal;
mod request;
mod settle;
mod wildcard;

pub use flow::{PipelineError, RouteError, RunnerError};
pub use open::{AttachError, ConnectError, NameError, OpenError};
pub use publish::{EnvelopeError, Holder, PublishError};
pub use receive::{GoneReason, RecvError};
pub use refusal::Refusal;
pub use request::{ReplyError, RequestError};
pub use settle::{AckError, SettleError};
pub use wildcard::WildcardError;
