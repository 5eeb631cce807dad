//! Where the station's frames leave.

use network::{FrameInfo, Output, PortId};

use crate::connection::VifId;
use crate::host::Host;
use crate::line::Line;
use crate::ports::Vifs;

/// The ways out of a station.
pub(crate) struct Outlet<'a, H: Host> {
    pub(crate) host: &'a mut H,
    pub(crate) vifs: &'a mut Vifs<H>,
    pub(crate) line: Option<&'a mut Line>,
    /// Room for a frame to the uplink, which may be changed before it is sent.
    pub(crate) outgoing: &'a mut [u8],
}

impl<H: Host> Output for Outlet<'_, H> {
    fn to_guest(&mut self, port: PortId, frame: &[u8], info: FrameInfo) {
        if let Some(place) = self.vifs.place_of(VifId(port)) {
            self.vifs.send(self.host, place, frame, info);
        }
    }

    fn to_uplink(&mut self, frame: &[u8], mut info: FrameInfo) {
        let Some(line) = &mut self.line else { return };
        if let Some(room) = self.outgoing.get_mut(..frame.len()) {
            room.copy_from_slice(frame);
            // The line counts what it drops.
            let _ = line.send(room, &mut info);
        }
    }
}
