//! What all received messages have in common, however they are held: in place, in a consumer's memory or in their own.

use crate::client::envelope::EnvelopeView;

/// What a received message knows about itself. [`received_message`] makes its public face of that.
pub(crate) trait Received {
    /// Its sequence.
    fn place(&self) -> u64;

    /// Publisher and its number, as far as they are known.
    fn author(&self) -> Option<(u64, u64)>;

    /// Its envelope, where the topic has them.
    fn envelope(&self) -> Option<EnvelopeView<'_>>;
}

/// Gives a type that is [`Received`] and has `as_bytes` the methods and traits of a received message. The names behind the type
/// are methods whose values belong into its debug output, too.
macro_rules! received_message {
    ($type:ident<$($lifetime:lifetime,)? T> $(, $shown:ident)*) => {
        impl<T: ?Sized> $type<$($lifetime,)? T> {
            /// The message's place in the topic.
            #[inline]
            pub fn sequence(&self) -> $crate::ring::sequence::Sequence {
                $crate::ring::sequence::Sequence::new($crate::client::received::Received::place(self))
            }

            /// The publisher's number on the bus. `None` on channels, and on exclusive topics where more than 255 publishers
            /// have followed since.
            pub fn publisher(&self) -> Option<u64> {
                $crate::client::received::Received::author(self).map(|(publisher, _)| publisher)
            }

            /// The publisher's own number of this message, from 1. `None` where [`Self::publisher`] is.
            pub fn publisher_number(&self) -> Option<u64> {
                $crate::client::received::Received::author(self).map(|(_, number)| number)
            }

            /// When it was published: CLOCK_REALTIME, in nanoseconds. `None` on topics without envelopes.
            pub fn timestamp_ns(&self) -> Option<u64> {
                $crate::client::received::Received::envelope(self).map(|envelope| envelope.timestamp_ns())
            }

            /// The key, if the publisher gave one.
            pub fn key(&self) -> Option<&[u8]> {
                $crate::client::received::Received::envelope(self).and_then(|envelope| envelope.key())
            }

            /// The publisher's own id of the message, if it gave one.
            pub fn id(&self) -> Option<&[u8]> {
                $crate::client::received::Received::envelope(self).and_then(|envelope| envelope.id())
            }

            /// The headers' names and values, in the order in which the publisher added them.
            pub fn headers(&self) -> impl Iterator<Item = (&str, &[u8])> {
                let envelope = $crate::client::received::Received::envelope(self);
                envelope.into_iter().flat_map(|envelope| envelope.headers())
            }

            /// The value of the first header of this name.
            pub fn header(&self, name: &str) -> Option<&[u8]> {
                self.headers().find(|(found, _)| *found == name).map(|(_, value)| value)
            }
        }

        impl<T: $crate::topic::Payload + ?Sized> std::ops::Deref for $type<$($lifetime,)? T> {
            type Target = T;

            #[inline]
            fn deref(&self) -> &T {
                match T::ref_from_bytes(self.as_bytes()) {
                    Ok(payload) => payload,
                    Err(_) => unreachable!("size and alignment were checked on receipt"),
                }
            }
        }

        impl<T: $crate::topic::Payload + std::fmt::Debug + ?Sized> std::fmt::Debug for $type<$($lifetime,)? T> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let mut parts = f.debug_struct(stringify!($type));
                parts.field("sequence", &self.sequence());
                $(parts.field(stringify!($shown), &self.$shown());)*
                parts.field("payload", &&**self).finish()
            }
        }
    };
}

pub(crate) use received_message;
