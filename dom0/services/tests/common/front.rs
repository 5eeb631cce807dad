//! What front ends of all kinds of devices have in common: the nodes and the states of both ends.

use super::guest::{Guest, Rounds};

/// A front end of one device.
pub trait FrontEnd<M: Rounds> {
    /// The name of the device's kind in paths of the store.
    const KIND: &'static str;

    fn device(&self) -> u32;

    /// Looks at the back end's state, and does what a stock front end does.
    fn step(&mut self, guest: &mut Guest<M>);

    /// Frees its rings, and is closed.
    fn close(&mut self, guest: &mut Guest<M>);

    /// The path of a node of the front end.
    fn path(&self, key: &str) -> String {
        format!("device/{}/{}/{key}", Self::KIND, self.device())
    }

    fn state(&self, guest: &mut Guest<M>) -> u32 {
        guest.get(&self.path("state")).and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    fn set_state(&self, guest: &mut Guest<M>, state: u32) {
        guest.put(&self.path("state"), &state.to_string());
    }

    /// The value of a node of the back end.
    fn back(&self, guest: &mut Guest<M>, key: &str) -> Option<String> {
        let back = guest.get(&self.path("backend"))?;
        guest.get(&format!("{back}/{key}"))
    }

    fn back_state(&self, guest: &mut Guest<M>) -> u32 {
        self.back(guest, "state").and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    /// Steps until both ends are connected.
    fn connect(&mut self, guest: &mut Guest<M>) {
        for _ in 0..30 {
            self.step(guest);
            if (self.state(guest), self.back_state(guest)) == (4, 4) {
                return;
            }
        }
        panic!("F={}, B={}", self.state(guest), self.back_state(guest));
    }
}
