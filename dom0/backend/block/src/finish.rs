//! The end of a turn: pins are given back, then requests are answered, then answers are published.

use crate::flight::Stage;
use crate::host::Host;
use crate::queue::Queue;

impl<H: Host> Queue<H> {
    /// Answers the requests that have ended. Returns whether there were any.
    pub(crate) fn finish(&mut self, host: &mut H) -> bool {
        // Unpin before answering: after the answer the front end ends its grants, and must not find them in use (ABI io 4.3).
        if !self.loose.is_empty() {
            host.unpin(&self.loose);
            self.loose.clear();
        }
        let ended = self.flights.at(Stage::End);
        for index in ended {
            let flight = self.flights.get(index);
            self.budget.give(flight.pins);
            if let Some(vbd) = self.vbds.get_mut(flight.vbd.0).and_then(Option::as_mut) {
                vbd.land(flight);
            }
            self.flights.go(index, Stage::Free);
        }
        self.clear_notes();
        self.vbds.iter_mut().flatten().for_each(|vbd| vbd.publish(host));
        !ended.is_empty()
    }
}
