//! Answers that tell of long ledgers: the status of their topic, and the bus report. The ledgers are counted between requests, so that
//! nobody waits for it but who asked.

use std::io;
use std::time::Instant;

use super::Server;
use crate::coordinator::limits::LOOK;
use crate::coordinator::protocol::{Answer, Request};

/// An answer that somebody waits for.
pub(super) struct Asked {
    incarnation: u64,
    request: Request,
    /// What was counted after that serves him.
    since: Instant,
    /// What is to be counted yet.
    rest: Vec<(u64, u32)>,
}

impl Server {
    /// Has a request answered later if that takes long, and whether it does. The client is not listened to until then.
    pub(super) fn wait_for_counts(&mut self, id: u64, incarnation: u64, request: &Request) -> bool {
        let since = Instant::now();
        let rest = self.estate.to_count(incarnation, request, since);
        let Some(client) = self.clients.get_mut(&id).filter(|_| !rest.is_empty()) else { return false };
        client.waits = true;
        let asked = Asked { incarnation, request: request.clone(), since, rest };
        self.counting.insert((client.peer.uid, id), asked);
        true
    }

    /// The client has gone, and does not wait any more.
    pub(super) fn stop_counting_for(&mut self, id: u64) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.waits = false;
            self.counting.remove(&(client.peer.uid, id));
        }
    }

    /// Counts for a while, for each user in turn, and answers those for whom all is counted. Who asks while others wait shares
    /// what is counted from then on.
    pub(super) fn go_on_counting(&mut self) -> io::Result<()> {
        let end = Instant::now() + LOOK;
        while let Some((uid, id)) = self.counts_next() {
            self.counted_for = uid;
            let Some(mut asked) = self.counting.remove(&(uid, id)).filter(|_| self.clients.contains_key(&id)) else {
                continue;
            };
            asked.rest.retain(|(topic, group)| self.estate.counted_since(*topic, *group, asked.since).is_none());
            self.estate.count_ahead(&mut asked.rest, end);
            if asked.rest.is_empty() {
                // What has come meanwhile.
                asked.rest = self.estate.to_count(asked.incarnation, &asked.request, asked.since);
            }
            if asked.rest.is_empty() {
                self.stop_counting_for(id);
                self.answer_counted(id, asked)?;
            } else {
                self.counting.insert((uid, id), asked);
            }
            if Instant::now() >= end {
                break;
            }
        }
        if self.counting.is_empty() {
            self.estate.forget_counts();
        }
        Ok(())
    }

    fn answer_counted(&mut self, id: u64, Asked { incarnation, request, since, .. }: Asked) -> io::Result<()> {
        if matches!(request, Request::Report) {
            return self.report(id, incarnation, since);
        }
        let answer = self.estate.counted_status(incarnation, &request, since);
        self.send(id, &answer.unwrap_or_else(Answer::Refused), Vec::new())
    }

    /// Whose answer it is to count for: another user's than the last one, if there is one.
    fn counts_next(&self) -> Option<(u32, u64)> {
        let others = self.counting.range((self.counted_for.wrapping_add(1), 0)..).next();
        others.or(self.counting.first_key_value()).map(|(key, _)| *key)
    }
}
