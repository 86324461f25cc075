//! Requests: futures of an answer that may be given up at any time.

use std::rc::Rc;

use kernel::sync::Promised;

use super::book::Reply;
use super::error::Error;
use super::shared::Shared;
use crate::proto::event::ReqId;
use crate::proto::unsettled::Settle;
use crate::wire::Method;

/// A request that waits for its answer. Dropping it abandons it: the answer is consumed in its turn, and what it brings is undone.
pub(super) struct Request {
    pub(super) shared: Rc<Shared>,
    pub(super) id: ReqId,
    pub(super) what: &'static str,
    pub(super) promised: Promised<Result<Reply, Error>>,
    pub(super) is_answered: bool,
}

impl Request {
    /// Waits for the answer.
    pub(super) async fn reply(mut self) -> Result<Reply, Error> {
        let outcome = self.promised.wait().await;
        match outcome {
            Ok(answer) => {
                self.is_answered = true;
                answer
            }
            Err(kernel::sync::Broken::Interrupted(interrupt)) => Err(interrupt.into()),
            Err(_) => {
                self.is_answered = true;
                let down = self.shared.down().cloned();
                Err(down.map_or(Error::Closed, Error::from))
            }
        }
    }

    /// Waits for a method, of which `pick` takes what matters.
    pub(super) async fn method<T>(
        self,
        pick: impl FnOnce(Method) -> Option<T>,
    ) -> Result<T, Error> {
        let what = self.what;
        match self.reply().await? {
            Reply::Method(method) => pick(method).ok_or(Error::WrongAnswer { what }),
            Reply::Got(_) => Err(Error::WrongAnswer { what }),
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if self.is_answered {
            return;
        }
        let asked = self.shared.book.borrow_mut().requests.remove(&self.id);
        if asked.is_some() {
            self.shared.with_core(|core| core.abandon(self.id));
        } else if let Some(Ok(Reply::Got(got))) = self.promised.try_take() {
            // It came, but nobody looked.
            self.shared.settle(got.key, Settle::Nack { requeue: true });
        }
        drop(asked);
    }
}
